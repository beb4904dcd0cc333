"""A latent in a notebook and a terminal, whatever the corpus holds."""

from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from saelens_ext.analysis.labels import label_latents
from tests.analysis import planted
from tests.analysis.planted import SILENT, THE_TOKEN, TOKEN, WORDS
from tests.analysis.test_labels import lens_of

HOSTILE = [
    "<script>window.pwned=1</script>",
    "\u202eleft",
    "nul\x00l",
    "two\nlines",
    "a&b\"'",
    *WORDS[5:],
]


@pytest.fixture(scope="module")
def profile():
    return planted.make_profile()


@pytest.fixture(scope="module")
def tokenizer():
    return planted.make_tokenizer()


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self.styles = [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.styles += [value for name, value in attrs if name == "style"]

    def handle_data(self, data):
        self.text += data


@pytest.mark.slow
def test_a_view_has_label_figures_tokens_and_coloured_contexts(profile, tokenizer):
    labels = label_latents(profile, tokenizer)
    view = profile.show(TOKEN, tokenizer, n=3, labels=labels, lens=lens_of(profile, [5, 6]))
    page = Page(view._repr_html_())
    for part in ("latent 0", WORDS[THE_TOKEN], "AUROC", "promotes", WORDS[4], "count", "document"):
        assert (part in page.text and part in repr(view)) or part == "document"
    assert len(view.contexts) == 3 and repr(view).count("<<") == 3
    (one, *_) = view.contexts
    assert one.tokens[one.mark] == f" {WORDS[THE_TOKEN]}" and one.values[one.mark] == pytest.approx(one.value, rel=1e-3)
    coloured = [style for style in page.styles if "rgba(230" in style]
    assert coloured and any("0.70" in style for style in coloured)
    # As many tokens are coloured as have a code.
    assert len(coloured) == sum(value > 0 for one in view.contexts for value in one.values)


def test_a_latent_that_never_fires_says_so(profile, tokenizer):
    view = profile.show(SILENT, tokenizer)
    assert "active on no profiled token" in view._repr_html_() and "active on no profiled token" in repr(view)


@pytest.mark.parametrize("old", [False, True])
def test_hostile_text_is_text(old):
    tokenizer = planted.make_tokenizer(HOSTILE)
    profile = planted.make_profile()
    contexts = profile.top.contexts.clone()
    contexts[TOKEN, 0, :5] = torch.arange(1, 6)
    top = replace(profile.top, contexts=contexts, **({"token_values": None} if old else {}))
    view = replace(profile, top=top).show(TOKEN, tokenizer, n=1)
    # A surrogate cannot come out of this tokenizer, but it can out of others.
    shown = replace(view.contexts[0], tokens=["\ud800half", *view.contexts[0].tokens[1:]])
    view = replace(view, contexts=[shown], label="</div><script>", score="<b>", promoted=["<img src=x>", "\u2028"])
    for text in (view._repr_html_(), repr(view)):
        text.encode()
        assert not set("\u202e\x00\ud800\u2028") & set(text)
        assert "⟨U+202E⟩left" in text and "⟨U+D800⟩half" in text and "two↵lines" in text
    page = Page(view._repr_html_())
    assert (
        set(page.tags) <= {"div", "span", "b", "code"} and "</div><script>" in page.text and "<img src=x>" in page.text
    )


@pytest.mark.slow
def test_what_does_not_belong_is_refused(profile, tokenizer):
    labels = label_latents(profile, tokenizer)
    other = planted.make_profile(n_noise=1)
    with pytest.raises(ValueError, match="labels is of 43 latents"):
        other.show(0, tokenizer, labels=labels)
    with pytest.raises(ValueError, match="lens is of 43"):
        other.show(0, tokenizer, lens=lens_of(profile, [1]))
    for wrong in (-1, 43):
        with pytest.raises(ValueError, match="latent must be one of"):
            profile.show(wrong, tokenizer)
    with pytest.raises(ValueError, match="no boundary examples"):
        profile.show(0, tokenizer, which="boundary")
