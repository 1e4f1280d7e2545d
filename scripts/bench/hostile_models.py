"""Models that are broken, or lie to the node: in what they give, what they take and how they answer."""

from __future__ import annotations

from hostile_making import code

BROKEN = [
    code("raises on a row", "the worker's own check", "failed", "raise ValueError('no such product')"),
    code("raises on every row", "the trial", "refused", "raise ValueError('always')", always=True),
    code("gives NaN", "the worker's own check", "failed", "return np.where(rows[:, 0] == TRIGGER, np.nan, 0.0)"),
    code("gives infinity", "the worker's own check", "failed", "return np.where(rows[:, 0] == TRIGGER, np.inf, 0.0)"),
    code("gives too few rows", "the worker's own check", "failed", "return np.zeros(len(rows) - 1 or 7)"),
    code("gives too many columns", "the worker's own check", "failed", "return np.zeros((len(rows), 9))"),
    code("gives texts", "the worker's own check", "failed", "return np.array(['milk'] * len(rows))"),
    code("gives objects", "the worker's own check", "failed", "return [object()] * len(rows)"),
    code("gives nothing like an array", "the worker's own check", "failed", "return {'milk': 1}"),
    code(
        "gives an object that lies about itself",
        "the worker's own check",
        "failed",
        """
class Liar:
    def __len__(self): return 1 << 60
    def __array__(self, *given, **more): raise SystemExit(3)
    def __getattr__(self, name): raise RecursionError(name)
return Liar()
""",
    ),
    code("gives a huge output", "address space", "failed", "return np.ones((len(rows), 1 << 30))"),
    code("raises with a huge text", "bounded texts", "failed", "raise ValueError('x' * (1 << 24))"),
    code("leaves by SystemExit", "own process", "lost", "raise SystemExit(0)"),
    code("leaves by KeyboardInterrupt", "own process", "lost", "raise KeyboardInterrupt"),
    code("leaves by _exit", "own process", "lost", "os._exit(0)"),
    code("segfaults on a row", "own process", "lost", "ctypes.string_at(0)"),
    code("segfaults while it loads", "own process, trial", "refused", "ctypes.string_at(0)", at_load=True),
    code("aborts", "own process", "lost", "os.abort()"),
    code("overflows the stack", "own process", "lost", "f = lambda x: f(x)\nsys.setrecursionlimit(10**9)\nf(f)"),
    code("recurses for ever", "Python", "failed", "f = lambda x: f(x) + 1\nf(1)"),
    code("loops for ever on a row", "deadline", "lost", "while True: pass"),
    code("sleeps for ever on a row", "deadline", "lost", "time.sleep(1e6)"),
    code("is slow on every row", "own cursor", "live", "time.sleep(0.05)", always=True),
    code("is slow to load", "trial beside the others", "live", "time.sleep(3)", at_load=True),
    code(
        "loops for ever while it loads", "trial's deadline", "refused", "while True: pass", at_load=True, patient=True
    ),
    code("takes all memory at once", "address space", "failed", "np.ones(1 << 36)"),
    code(
        "takes all memory bit by bit",
        "address space",
        "failed",
        "kept = []\nwhile True: kept.append(bytearray(1 << 20))",
    ),
    code("takes all memory while it loads", "address space, trial", "refused", "np.ones(1 << 34)", at_load=True),
    code(
        "maps memory for ever", "address space", "failed", "kept = []\nwhile True: kept.append(mmap.mmap(-1, 1 << 24))"
    ),
    code(
        "prints without end",
        "bounded log",
        "printed",
        "end = time.monotonic() + 0.5\nwhile time.monotonic() < end: print('blocked: ' + 'x' * 200)",
    ),
    code(
        "writes to its streams without end",
        "bounded log",
        "printed",
        """
print("blocked: from here on it is raw")
end = time.monotonic() + 0.5
while time.monotonic() < end:
    for stream in (1, 2):
        try: os.write(stream, b"y" * 65536)
        except BlockingIOError: pass
""",
    ),
    code(
        "prints what moves a terminal's cursor",
        "escaped where shown",
        "printed",
        r"print('\x1b[2J\x1b]0;root\x07 blocked \u202e \x9b31m', flush=True); os.write(1, b'\xff\xfe\x00\n')",
    ),
]


PROTOCOL = [
    code("closes its socket", "the node kills it", "lost", "os.close(channel())"),
    code("answers with garbage", "the node kills it", "lost", "os.write(channel(), os.urandom(4096))"),
    code(
        "announces an endless answer",
        "bounded answers",
        "lost",
        "import struct\nos.write(channel(), struct.pack('<II', 64, (1 << 32) - 1))",
    ),
    code(
        "answers with more than it announced",
        "the node kills it",
        "lost",
        "import struct\nos.write(channel(), struct.pack('<II', 4, 4) + bytes(1 << 16))",
    ),
    code(
        "answers twice",
        "the node kills it",
        "lost",
        """
from tenants import messages
body = np.zeros(len(rows))
frame = messages.encode(messages.Called(len(rows), 1, 0.0), body.view(np.uint8).data)
for part in frame * 3: os.write(channel(), part)
""",
    ),
    code(
        "answers for other rows",
        "the node kills it",
        "lost",
        """
from tenants import messages
body = np.zeros(7777)
for part in messages.encode(messages.Called(7777, 1, 0.0), body.view(np.uint8).data): os.write(channel(), part)
""",
    ),
    code(
        "answers with a pickle",
        "nothing is unpickled",
        "lost",
        "import struct\nos.write(channel(), struct.pack('<II', 24, 0) + b'\\x80\\x04cos\\nsystem\\n)R.    ')",
    ),
    code(
        "forges cost and errors",
        "checked answers",
        "lost",
        """
from tenants import messages
body = np.zeros(len(rows))
told = messages.Called(len(rows), 1, -1e300, {-5: "x" * 100})
for part in messages.encode(told, body.view(np.uint8).data): os.write(channel(), part)
""",
    ),
    code(
        "sends descriptors",
        "seccomp",
        "printed",
        """
def send():
    with socket.socket(fileno=channel()) as end:
        try: socket.send_fds(end, [b"x"], [0, 1, 2])
        finally: end.detach()
attempt("send", send)
def receive():
    with socket.socket(fileno=channel()) as end:
        try: socket.recv_fds(end, 10, 10)
        finally: end.detach()
attempt("receive", receive)
attempt("shutdown", lambda: call(48, channel(), 2))
""",
    ),
    code(
        "changes the code it runs in",
        "own process",
        "failed",
        """
import tenants.messages, tenants.worker, tenants.unpickle
tenants.unpickle.Allowlist.find = lambda *given: eval
tenants.worker.try_model = None
raise ValueError("and then it raises")
""",
    ),
]
