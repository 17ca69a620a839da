"""A server on this machine that speaks OpenAI's protocol, says what it is told to say, and keeps what it was sent."""

import json
import math
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text, tokens=None, reason="stop"):
    """tokens: [{token: probability, ...}], the first of each the one that was said."""
    content = tokens and [
        {"token": next(iter(t)), "logprob": math.log(next(iter(t.values()))), "top_logprobs": [{"token": k, "logprob": math.log(p)} for k, p in t.items()]} for t in tokens
    ]
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": reason, "logprobs": content and {"content": content}}]}


class Server(ThreadingHTTPServer):
    """answers: what to say next, each (status, object or bytes, headers); the last one again and again."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.seen = [(200, completion("yes"), {})], []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def say(self, *answers):
        self.answers, self.seen = [a if isinstance(a, tuple) else (200, a, {}) for a in answers], []


class Handler(BaseHTTPRequestHandler):
    def answer(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.path, dict(self.headers), json.loads(raw) if raw else None))
        status, said, headers = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        body = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = answer

    def log_message(self, *_):
        pass
