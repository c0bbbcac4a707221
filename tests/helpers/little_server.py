"""A server as `serve:` starts one, for faults: python little_server.py MODEL PORT [how it fails].

It answers /v1/models and /v1/completions, after a moment, with the token ids in MODEL/answer.json, and has
a child in a session of its own, as the engines of real servers are. Its own and the child's number are lines of
MODEL/processes.
"""

import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CHILD = "import sys, time; time.sleep(600)"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({"data": [{"id": str(folder)}]})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(1.0 if how == "slow" else 0.1)
        ids = json.loads((folder / "answer.json").read_text())
        choice = {"token_ids": ids, "finish_reason": "stop", "text": "", "logprobs": None}
        self.answer({"nothing": 0} if how == "garbage" else {"choices": [choice]})

    def answer(self, what):
        body = json.dumps(what).encode()
        self.send_response(404 if how == "silent" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


folder, port, how = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else ""
if how == "dies":
    print("no such model, says the little server")
    sys.exit(3)
child = subprocess.Popen([sys.executable, "-S", "-c", CHILD], start_new_session=True)
with (folder / "processes").open("a") as file:
    file.write(f"{os.getpid()} {child.pid} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}\n")
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
