"""Serve a converted model behind an OpenAI-compatible API and ask it something.

    python examples/serve_and_query.py DIR [--prompt TEXT] [--port 8123]

DIR: what `lrkv convert` or examples/convert_and_load.py wrote. Needs `pip install
'lrkv-convert[serve]'`. Seconds, once DIR is there.
"""

import argparse
import json
import subprocess
import time
import urllib.error
import urllib.request

parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("--prompt", default="The capital of France is")
parser.add_argument("--port", type=int, default=8123)
args = parser.parse_args()
address = f"http://127.0.0.1:{args.port}"

server = subprocess.Popen(
    ["lrkv", "serve", args.folder, "--host", "127.0.0.1", "--port", str(args.port)]
)
try:
    while True:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2)
            break
        except (urllib.error.URLError, OSError):
            if server.poll() is not None:
                raise SystemExit("the server did not start") from None
            time.sleep(0.5)
    body = {"model": args.folder, "prompt": args.prompt, "max_tokens": 16, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        reply = json.loads(answer.read())
    print(args.prompt + reply["choices"][0]["text"])
    print(f"{reply['usage']['completion_tokens']} tokens, served from {args.folder}")
finally:
    server.terminate()
    server.wait()
