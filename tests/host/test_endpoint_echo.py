"""Servers that put what was asked before their answer."""

import pytest

from saelens_ext.host.chat_endpoint import ChatEndpoint, EndpointUnavailableError
from saelens_ext.host.endpoint import gives_back
from tests.harnesses.openai_script import scripted

TASK, MATERIAL = "Rate the text. End with 'Rating: 0', 'Rating: 1' or 'Rating: 2'.", "The text: Rating is hard."
ECHOES = {
    "tags": lambda task, material: f"<s><|system|>{task}</s><|user|>\n{material}<|assistant|> ",
    "roles": lambda task, material: f"system\n{task}\nuser\n{material}\nassistant\n",
    "plain": lambda task, material: f"{task}\n\n{material}\n",
}


def asked(say):
    with scripted(lambda n, body: (200, say(*(one["content"] for one in body["messages"][:2])))) as server:
        endpoint = ChatEndpoint(server.url, "m", api_key="none", max_attempts=1, max_retries=0)
        return endpoint.ask(TASK, MATERIAL, lambda text: text[-1] if "Rating" in text else None, "Rate it.")


@pytest.mark.parametrize("form", ECHOES)
def test_a_chat_that_puts_the_question_before_its_answer_is_an_error(form):
    with pytest.raises(EndpointUnavailableError, match="it puts the question before its answer; turn that off there"):
        asked(lambda task, material: ECHOES[form](task, material) + "Rating: 1")


def test_an_answer_that_quotes_a_part_of_the_question_is_read():
    assert asked(lambda task, material: f"{material} So: Rating: 1") == "1"
    assert asked(lambda task, material: f"{task} Well, Rating: 2") == "2"
    assert asked(lambda task, material: f"{material} {task} Rating: 0") == "0"


def test_what_counts_as_given_back():
    assert gives_back("<s>The cat\n sat", "The cat") and gives_back("The cat", "The  cat")
    assert not gives_back("A cat", "The cat") and not gives_back("", "The cat")
    assert not gives_back("anything", "<s> ") and not gives_back("anything", ""), "nothing was asked that can be seen"
    assert not gives_back("word " * 9 + "The cat", "The cat"), "too far in"
