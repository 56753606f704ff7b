"""Exercise: put chapter 01's reader of digits behind an HTTP endpoint, and show that it answers as it does offline.

    python 01_basics/train.py                                      first, to have a model
    python tests/exercises/serve.py                                serves on http://127.0.0.1:8000 until Ctrl-C
    curl --data-binary @digit.png http://127.0.0.1:8000/           {"digit": 7, "probabilities": [...]}
    python tests/exercises/serve.py --check 10000 --clients 4      sends test digits over HTTP, from four threads

You should see (MNIST, 01's train.py with seed 0, --check 300; one core of an AMD EPYC that other programs shared;
torch 2.15): accuracy over HTTP 99.33 %, offline 99.33 %, no answer differs, probabilities by 7.7e-7 at most
(one picture at a time is summed in another order than 300 at once); latency 2.8 ms (median) and 16 ms (99th
percentile), with four clients 7.8 ms and 24 ms, and twice as many digits per second.
Learned: the network is the smallest part of it. Two lines decide: where gradients are turned off, and one setting of
the socket, without which an answer took 52 ms instead of 2.8.
Left out on purpose: batching of requests that arrive together, HTTPS, a password: put a real web server in front.
"""

import argparse
import http.client
import io
import json
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError  # Pillow comes with torchvision
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "01_basics")]
import utils
from load import load_data, normalise
from load_model import load_network, read_image

# Shapes: N pictures, K classes (10 digits)

LIMIT = 10_000_000  # bytes; without a limit, one client could fill the memory


# ---------------------------------------------------------------------------------------------- from bytes to an answer
def to_picture(body: bytes) -> Tensor:
    """What a client sent, as (28, 28) uint8, ink 255. Raises utils.InputError where it is no picture of one digit.

    ## The network must be shown what it was trained on. A grey picture of 28 x 28 is taken for one of MNIST's, as it
    ## is; anything else, a photograph for example, goes through chapter 01's preparation, and not through a simpler one
    ## of the server's own: most models that are good offline and bad in service see other pixels there.
    """
    try:
        with Image.open(io.BytesIO(body)) as picture:
            if picture.size == (28, 28) and picture.mode == "L":
                return pil_to_tensor(picture)[0]
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise utils.InputError("the body can't be read as a picture; POST the bytes of one PNG or JPEG.") from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture"
        path.write_bytes(body)
        try:
            return read_image(path)
        except utils.InputError as error:
            raise utils.InputError(str(error).replace(str(path), "the picture")) from error


class Reader:
    """A trained network with the two numbers that its inputs are normalised by."""

    def __init__(self, path: Path):
        self.model, saved = load_network(path)  # in eval mode once, before the first request
        self.mean, self.std, self.data = saved["mean"], saved["std"], saved["data"]

    ## Whether gradients are recorded is a setting of each thread. Turned off in the main thread, it is still on in
    ## those that answer requests, and every answer would drag its graph along. As a decorator it goes wherever the
    ## function is called. No lock is needed around the call: in eval mode a forward pass only reads the weights.
    ## (Batch norm in train mode writes its running averages, and would need one.)
    @torch.inference_mode()
    def probabilities(self, x: Tensor) -> Tensor:
        """(N, 28, 28) uint8 -> (N, K)."""
        return self.model(normalise(x, self.mean, self.std).flatten(1)).softmax(1)


# ---------------------------------------------------------------------------------------------- HTTP
def make_server(reader: Reader, host: str, port: int) -> ThreadingHTTPServer:
    """A server with a thread per connection; port 0 takes any free one. Raises utils.InputError for a taken port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # the connection stays open for the next picture
        timeout = 30  # seconds: who says nothing for so long does not keep a thread
        ## Headers and body are written one after the other. Nagle's algorithm holds the second back until the first was
        ## acknowledged, and the client's system waits 40 ms before it says so: 52 ms per answer instead of 2.8.
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not (length.isascii() and length.isdigit() and 0 < int(length[:20]) <= LIMIT):
                self.close_connection = True  # what comes next can't be told from a next request
                return self.answer(400, {"error": f"Content-Length must be from 1 to {LIMIT}; POST one picture."})
            try:
                p = reader.probabilities(to_picture(self.rfile.read(int(length)))[None])[0]  # (K,)
            except utils.InputError as error:
                return self.answer(400, {"error": str(error)})
            self.answer(200, {"digit": p.argmax().item(), "probabilities": p.tolist()})

        def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
            """What the base class refuses, as JSON as well: another method than POST, a line that is no HTTP."""
            self.close_connection = True
            self.answer(400, {"error": f"{message or 'bad request'}; POST the bytes of one PNG or JPEG."})

        def answer(self, code: int, value: dict) -> None:
            body = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_) -> None:
            """Nothing: a line per request costs more than the network does."""

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise utils.InputError(f"--host {host} --port {port} can't be used ({error}); choose another port.") from error
    server.daemon_threads = True  # Ctrl-C does not wait for clients
    return server


def ask(port: int, bodies: list[bytes], answers: list, seconds: list[float], first: int, step: int) -> None:
    """One client: send bodies[first::step] over one connection; put answers, and seconds each took, at their places."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    for i in range(first, len(bodies), step):
        begun = time.perf_counter()
        connection.request("POST", "/", bodies[i])
        reply = connection.getresponse()
        answers[i] = json.loads(reply.read()) | {"status": reply.status}
        seconds[i] = time.perf_counter() - begun
    connection.close()


def check(reader: Reader, x: Tensor, y: Tensor, clients: int) -> dict:
    """Send x (N, 28, 28) uint8 as PNGs from `clients` threads; compare with x offline and with the labels y (N,)."""
    bodies = []
    for picture in x:
        file = io.BytesIO()
        to_pil_image(picture).save(file, "PNG")  # PNG loses nothing; a JPEG would change the pixels
        bodies.append(file.getvalue())
    server = make_server(reader, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    answers, seconds = [None] * len(x), [0.0] * len(x)
    begun = time.perf_counter()
    threads = [threading.Thread(target=ask, args=(server.server_port, bodies, answers, seconds, first, clients))
               for first in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = time.perf_counter() - begun
    server.shutdown()
    server.server_close()
    offline = reader.probabilities(x)  # (N, K), all at once
    online = torch.tensor([answer["probabilities"] for answer in answers])
    said = torch.tensor([answer["digit"] for answer in answers])
    seconds = torch.tensor(seconds)
    return {"online": (said == y).float().mean().item(), "offline": (offline.argmax(1) == y).float().mean().item(),
            "differ": (said != offline.argmax(1)).sum().item(), "largest": (online - offline).abs().max().item(),
            "median": seconds.median().item(), "p99": seconds.quantile(0.99).item(), "rate": len(x) / whole}


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=ROOT / "01_basics" / "outputs" / "model.pt", help="what 01's train.py wrote")
    add("--data", help="mnist or typeset, for --check; without it, what the model was trained on")
    add("--host", default="127.0.0.1", help="0.0.0.0 opens it to the network, where nothing protects it")
    add("--port", type=int, default=8000)
    add("--check", type=int, default=0, metavar="N", help="send N test digits over HTTP, report, and end")
    add("--clients", type=int, default=1, help="threads that send them at the same time")
    args = parser.parse_args()
    if args.check < 0 or args.clients < 1:
        raise utils.InputError("--check must not be negative, --clients at least 1.")
    reader = Reader(args.model)
    if not args.check:
        server = make_server(reader, args.host, args.port)
        print(f"serving {args.model} on http://{args.host}:{server.server_port}; Ctrl-C ends it", flush=True)
        server.serve_forever()
    data = load_data(args.data or reader.data)
    x, y = data.test_x[: args.check], data.test_y[: args.check]
    found = check(reader, x, y, args.clients)
    print(f"{data.label}: {len(x):,} test digits, {args.clients} client(s)\n"
          f"accuracy over HTTP {found['online']:.2%}, offline {found['offline']:.2%}; {found['differ']} answers "
          f"differ, probabilities by at most {found['largest']:.1e}\nlatency: median {found['median'] * 1e3:.2f} ms, "
          f"99th percentile {found['p99'] * 1e3:.2f} ms; {found['rate']:,.0f} digits per second")


if __name__ == "__main__":
    utils.run(main)
