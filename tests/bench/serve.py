"""A directory over HTTP with byte ranges, as object storage gives it: `python serve.py
DIR DELAY_S`. Prints its port.

Each request waits DELAY_S first, which stands for the way to a data centre and back.
"""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer


class Ranges(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *args, delay_s: float, **options) -> None:
        self.delay_s = delay_s
        super().__init__(*args, **options)

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, *, body: bool) -> None:
        time.sleep(self.delay_s)
        path = self.translate_path(self.path)
        if not os.path.isfile(path):
            self.send_error(404)
            return
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            span = self.headers.get("Range", "")
            begin, _, last = span.removeprefix("bytes=").partition("-")
            start, end = (int(begin), min(int(last) + 1, size) if last else size) if span else (0, size)
            self.send_response(206 if span else 200)
            if span:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            while body and start < end:
                start += os.sendfile(self.connection.fileno(), file.fileno(), start, end - start)

    def log_message(self, *_: object) -> None:
        pass


def main(folder: str, delay_s: float) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=folder, delay_s=delay_s))
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
