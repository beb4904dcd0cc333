"""A tiny model behind a loopback server, as completions endpoints serve one."""

import threading

import torch

from saelens_ext.host.continued_text import text_after
from saelens_ext.host.tokens import token_strings
from saelens_ext.ops.modes import evaluating
from saelens_ext.steering.sampling import SamplingOptions, draw_continuations

LOCK = threading.Lock()


def completion(model, body, form="openai"):
    """The reply of a server of the model to a request: with token ids where ``form`` is "ids" or "llama.cpp"."""
    prompt = body["prompt"]
    ids = torch.tensor(model.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)
    options = SamplingOptions(
        max_new_tokens=body["max_tokens"],
        temperature=body["temperature"],
        top_p=body["top_p"],
        top_k=None,
        seed=body["seed"],
    )
    with LOCK, evaluating(model):
        drawn = draw_continuations(model, ids, range(body.get("n", 1)), options, stop=body.get("stop", ()))
    choices = []
    for index, one in enumerate(drawn):
        tokens, scores = token_strings(model.tokenizer, one.token_ids), one.log_probs.tolist()
        logprobs = {"tokens": tokens, "token_logprobs": scores, "top_logprobs": None}
        if form == "llama.cpp":
            each = zip(one.token_ids, tokens, scores)
            logprobs = {"content": [{"id": i, "token": token, "logprob": score} for i, token, score in each]}
        choices.append(
            {
                "index": index,
                "text": text_after(model, ids.tolist(), one.token_ids),
                "finish_reason": "length" if one.ended_by == "length" else "stop",
                "logprobs": logprobs,
                **({"token_ids": [*one.token_ids, 1]} if form == "ids" else {}),
            }
        )
    return {"id": "1", "object": "text_completion", "choices": choices, "usage": {"prompt_tokens": len(ids)}}


def served(model, form="openai"):
    """What a server plays."""
    return lambda n, body: (200, completion(model, body, form))
