"""A loopback server that answers as OpenAI's completions do, by a script."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Script(ThreadingHTTPServer):
    """Answers the n-th request by ``play(n, body)``: a status and what is said, or None for silence.

    Said is the text of a chat's answer, a whole reply as a dict, or bytes that are no JSON.
    """

    daemon_threads = True

    def __init__(self, play):
        super().__init__(("127.0.0.1", 0), _Scripted)
        self.play, self.bodies, self.over, self.lock = play, [], threading.Event(), threading.Condition()
        self.keys = set()

    def was_asked(self, n):
        """Whether ``n`` requests came; one whose client has given up may still lie unread."""
        with self.lock:
            return self.lock.wait_for(lambda: len(self.bodies) >= n, timeout=60)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Scripted(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.add(self.headers["Authorization"])
            number = len(self.server.bodies)
            self.server.lock.notify_all()
        reply = self.server.play(number, body)
        if reply is None:
            self.server.over.wait(10)
            return
        status, text = reply
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        content = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        content = text if isinstance(text, dict) else content if status == 200 else {"error": {"message": text}}
        data = text if isinstance(text, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if isinstance(text, bytes) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("retry-after-ms", "5")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextmanager
def scripted(play):
    """Serve inside the context."""
    server = Script(play)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
