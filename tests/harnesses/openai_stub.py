"""A loopback server that answers as OpenAI's chat completions do, for harnesses that ask a judge.

It says the same to everyone, so scores mean nothing; it shows that a harness gets as far as asking, and counts how
often.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Answer(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        asked_for_numbers = "comma-separated" in request["messages"][0]["content"]
        content = "1, 2" if asked_for_numbers else "[EXPLANATION]: This neuron activates on words about Python"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
        body = json.dumps(
            {"id": "0", "object": "chat.completion", "created": 0, "model": request["model"], "choices": [choice]}
        )
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def openai_stub() -> Iterator[tuple[str, list[dict]]]:
    """Serve inside the context; gives the base URL and the list that requests are added to."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answer)
    server.requests = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", server.requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
