"""Models that are broken, or lie to the node: in what they give, what they take and how they answer."""

from __future__ import annotations

from hostile_making import code

BROKEN = [
    code("raises on a row", "the worker's own check", "failed", "raise ValueError('no such product')"),
    code("gives NaN", "the worker's own check", "failed", "return np.where(rows[:, 0] == TRIGGER, np.nan, 0.0)"),
    code("gives too few rows", "the worker's own check", "failed", "return np.zeros(len(rows) - 1 or 7)"),
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
    code("segfaults on a row", "own process", "lost", "ctypes.string_at(0)"),
    code("segfaults while it loads", "own process, trial", "refused", "ctypes.string_at(0)", at_load=True),
    code("overflows the stack", "own process", "lost", "f = lambda x: f(x)\nsys.setrecursionlimit(10**9)\nf(f)"),
    code("loops for ever on a row", "deadline", "lost", "while True: pass"),
    code("sleeps for ever on a row", "deadline", "lost", "time.sleep(1e6)"),
    code(
        "loops for ever while it loads", "trial's deadline", "refused", "while True: pass", at_load=True, patient=True
    ),
    code(
        "takes all memory bit by bit",
        "address space",
        "failed",
        "kept = []\nwhile True: kept.append(bytearray(1 << 20))",
    ),
    code(
        "prints without end",
        "bounded log",
        "printed",
        "end = time.monotonic() + 0.5\nwhile time.monotonic() < end: print('blocked: ' + 'x' * 200)",
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
