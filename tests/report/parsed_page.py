"""The elements, attributes and texts of a page, for tests of what it may hold."""

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """Elements, attributes and the text of each element of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.data: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.data.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.data))
