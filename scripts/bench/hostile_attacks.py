"""Code in a worker that reaches for what is not its own: network, files, processes, the kernel."""

from __future__ import annotations

from hostile_making import code

NETWORK = [
    code(
        "connects by TCP",
        "seccomp",
        "printed",
        """
for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
    attempt(host, lambda: socket.socket(family).connect((host, TARGET["tcp"])))
""",
    ),
    code(
        "sends by UDP",
        "seccomp",
        "printed",
        "attempt('udp', lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', TARGET['udp'])))",
    ),
    code(
        "connects to a Unix socket",
        "seccomp",
        "printed",
        "attempt('unix', lambda: socket.socket(socket.AF_UNIX).connect(TARGET['unix']))",
    ),
    code(
        "connects to an abstract socket",
        "seccomp",
        "printed",
        "attempt('abstract', lambda: socket.socket(socket.AF_UNIX).connect(chr(0) + TARGET['abstract']))",
    ),
    code(
        "opens other sockets",
        "seccomp",
        "printed",
        """
for family, kind in ((16, 3), (17, 3), (40, 1), (38, 5), (2, 3), (31, 3), (44, 3)):
    attempt(f"family {family}", lambda: socket.socket(family, kind))
""",
    ),
]
FILES = [
    code(
        "reads others' files",
        "landlock",
        "printed",
        """
for path in (TARGET["secret"], "/etc/shadow", "/etc/passwd", "/root/.bashrc", "/proc/mounts", "/proc/net/tcp"):
    attempt(path, lambda: read(path))
for path in ("/", "/tmp", "/proc", "/root", TARGET["outside"]):
    attempt(path, lambda: os.listdir(path))
""",
    ),
    code(
        "reads the node's memory and environment",
        "landlock, own user, no dumps",
        "printed",
        """
for process in (TARGET["node"], os.getppid(), *TARGET["others"], "self"):
    for name in ("environ", "mem", "maps", "cmdline", "fd/0", "root/etc/shadow", "cwd/node.toml"):
        attempt(f"{process} {name}", lambda: read(f"/proc/{process}/{name}"))
def environment():
    if TARGET["environment"] not in os.environ: raise LookupError("not in the environment")
attempt("environment", environment)
""",
    ),
    code(
        "writes files",
        "landlock, seccomp",
        "printed",
        """
places = [f"{folder}/written" for folder in (TARGET["outside"], "/tmp", "/dev/shm", "/var/tmp", ".")]
for path in (*places, TARGET["secret"]):
    for flags in (os.O_WRONLY | os.O_CREAT, os.O_RDWR, os.O_WRONLY | os.O_APPEND, os.O_WRONLY | os.O_TRUNC):
        attempt(f"{path} {flags}", lambda: os.open(path, flags, 0o666))
attempt("tmpfile", lambda: os.open(TARGET["outside"], os.O_TMPFILE | os.O_RDWR, 0o666))
""",
    ),
    code(
        "changes folders and links",
        "seccomp",
        "printed",
        """
outside, secret = TARGET["outside"], TARGET["secret"]
attempt("mkdir", lambda: os.mkdir(f"{outside}/made"))
attempt("symlink", lambda: os.symlink(secret, f"{outside}/made"))
attempt("link", lambda: os.link(secret, f"{outside}/made"))
attempt("rename", lambda: os.rename(secret, f"{outside}/made"))
attempt("unlink", lambda: os.unlink(secret))
attempt("truncate", lambda: os.truncate(secret, 0))
attempt("chmod", lambda: os.chmod(secret, 0o777))
attempt("chown", lambda: os.chown(secret, 0, 0))
attempt("utime", lambda: os.utime(secret))
attempt("mkfifo", lambda: os.mkfifo(f"{outside}/made"))
attempt("mknod", lambda: os.mknod(f"{outside}/made", 0o600 | stat.S_IFCHR, 259))
attempt("chdir", lambda: os.chdir(outside))
attempt("chroot", lambda: os.chroot(outside))
attempt("xattr", lambda: os.setxattr(secret, "user.made", b"x"))
""",
    ),
    code(
        "opens devices",
        "landlock",
        "printed",
        """
for path in ("/dev/mem", "/dev/kmsg", "/dev/fuse", "/dev/tty", "/dev/vda", "/dev/kvm", "/dev/random", "/dev/null"):
    attempt(path, lambda: os.close(os.open(path, os.O_RDWR)))
""",
    ),
]
PROCESSES = [
    code(
        "forks a bomb",
        "seccomp",
        "printed",
        """
def bomb():
    while True:
        os.fork()
attempt("fork", bomb)
for number, what in ((56, "clone"), (57, "fork"), (58, "vfork"), (435, "clone3")):
    attempt(what, lambda: call(number, 17, 0, 0, 0, 0))
""",
    ),
    code(
        "starts threads without end",
        "seccomp",
        "printed",
        """
import threading
def bomb():
    while True:
        threading.Thread(target=time.sleep, args=(1000,)).start()
attempt("threads", bomb)
""",
    ),
    code(
        "leaves a daemon behind",
        "seccomp",
        "printed",
        """
def daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1000)
attempt("daemon", daemon)
attempt("session", os.setsid)
""",
    ),
    code(
        "runs programs",
        "seccomp",
        "printed",
        """
import subprocess
attempt("exec", lambda: os.execv("/bin/sh", ["sh", "-c", "true"]))
attempt("execveat", lambda: call(322, -100, b"/bin/sh", 0, 0, 0))
attempt("subprocess", lambda: subprocess.run(["/bin/true"]))
def system():
    if os.system("true") < 0: raise OSError("not run")
    if os.system("exit 7") != 7 << 8: raise OSError("not run")
attempt("system", system)
attempt("spawn", lambda: os.posix_spawn("/bin/true", ["true"], {}))
""",
    ),
    code(
        "uses more threads than its share",
        "one thread a worker",
        "printed",
        """
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.utils import _openmp_helpers
ctypes.CDLL(_openmp_helpers.__file__).omp_set_num_threads(8)
data = np.random.default_rng(0).random((20000, 8)); target = data[:, 0] > 0.5
wall, spent = time.monotonic(), time.process_time()
data.T @ data
HistGradientBoostingClassifier(max_iter=5).fit(data, target).predict(data)
wall, spent = time.monotonic() - wall, time.process_time() - spent
def more():
    if spent < 1.3 * wall + 0.1: raise OSError(f"{spent:.2f} s of CPU in {wall:.2f} s")
attempt("more than one core", more)
""",
    ),
    code(
        "signals others",
        "seccomp",
        "printed",
        """
for process in (TARGET["node"], os.getppid(), *TARGET["others"], -1, 0, 1):
    for number in (0, signal.SIGKILL, signal.SIGSTOP):
        attempt(f"kill {process} {number}", lambda: os.kill(process, number))
    attempt(f"pidfd {process}", lambda: os.pidfd_open(process))
    attempt(f"tgkill {process}", lambda: call(234, process, process, 9))
    attempt(f"tkill {process}", lambda: call(200, process, 9))
    attempt(f"queue {process}", lambda: call(129, process, 9, 0))
attempt("own", lambda: call(72, channel(), 8, TARGET["node"]))
attempt("signal at", lambda: call(72, channel(), 10, 9))
""",
    ),
    code(
        "traces others",
        "seccomp",
        "printed",
        """
buffer = ctypes.create_string_buffer(64)
for process in (TARGET["node"], os.getppid(), *TARGET["others"]):
    attempt(f"attach {process}", lambda: call(101, 16, process, 0, 0))
    attempt(f"seize {process}", lambda: call(101, 0x4206, process, 0, 0))
    attempt(f"read {process}", lambda: call(310, process, buffer, 1, buffer, 1, 0))
    attempt(f"write {process}", lambda: call(311, process, buffer, 1, buffer, 1, 0))
    attempt(f"compare {process}", lambda: call(312, process, process, 0, 0, 0))
    attempt(f"steal {process}", lambda: call(438, process, 0, 0))
attempt("dumpable", lambda: call(157, 4, 1, 0, 0, 0))
""",
    ),
    code(
        "takes a better place",
        "seccomp, resource limits",
        "printed",
        """
import resource
attempt("nice", lambda: os.nice(-20))
attempt("priority", lambda: os.setpriority(os.PRIO_PROCESS, TARGET["node"], 19))
attempt("scheduler", lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(99)))
attempt("affinity", lambda: os.sched_setaffinity(TARGET["node"], {0}))
attempt("input and output", lambda: call(251, 1, 0, 0))
for kind in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE):
    attempt(f"limit {kind}", lambda: resource.setrlimit(kind, (1 << 40, 1 << 40)))
attempt("limit of the node", lambda: resource.prlimit(TARGET["node"], resource.RLIMIT_NOFILE, (8, 8)))
attempt("locked memory", lambda: call(151, 1))
attempt("out-of-memory score", lambda: os.open("/proc/self/oom_score_adj", os.O_WRONLY))
""",
    ),
    code(
        "becomes another user",
        "seccomp, own user",
        "printed",
        """
attempt("user", lambda: os.setuid(0))
attempt("users", lambda: os.setresuid(0, 0, 0))
attempt("group", lambda: os.setgid(0))
attempt("groups", lambda: os.setgroups([0]))
attempt("capabilities", lambda: call(126, 0, 0))
attempt("file system user", lambda: call(122, 0))
""",
    ),
    code(
        "computes when it is asked nothing",
        "unasked CPU time",
        "lost",
        """
import tenants.worker
def spin(self):
    while True: pass
tenants.worker.Channel.read = spin
""",
        patient=True,
    ),
]
KERNEL = [
    code(
        "mounts and unshares",
        "seccomp",
        "printed",
        """
attempt("mount", lambda: call(165, b"none", b"/tmp", b"tmpfs", 0, 0))
attempt("umount", lambda: call(166, b"/proc", 0))
attempt("open tree", lambda: call(428, -100, b"/", 1))
attempt("file system", lambda: call(430, b"tmpfs", 0))
attempt("pivot", lambda: call(155, b"/", b"/"))
for flags in (0x10000000, 0x20000, 0x40000000, 0x20000000):
    attempt(f"unshare {flags:x}", lambda: call(272, flags))
attempt("name space", lambda: call(308, 0, 0))
""",
    ),
    code(
        "goes round the filter by io_uring",
        "seccomp",
        "printed",
        """
parameters = ctypes.create_string_buffer(256)
attempt("setup", lambda: call(425, 8, parameters))
attempt("enter", lambda: call(426, 3, 1, 0, 0, 0))
attempt("register", lambda: call(427, 3, 0, 0, 0))
attempt("aio", lambda: call(206, 8, parameters))
""",
    ),
    code(
        "loads bpf, watches and handles faults",
        "seccomp",
        "printed",
        """
block = ctypes.create_string_buffer(256)
attempt("bpf", lambda: call(321, 5, block, 128))
attempt("perf", lambda: call(298, block, 0, -1, -1, 0))
attempt("userfaultfd", lambda: call(323, 0))
attempt("fanotify", lambda: call(300, 0, 0))
attempt("inotify", lambda: call(294, 0))
attempt("handle", lambda: call(304, 0, block, 0))
attempt("module", lambda: call(175, block, 8, b""))
attempt("kexec", lambda: call(246, 0, 0, 0, 0))
attempt("landlock", lambda: call(444, block, 8, 0))
attempt("filter", lambda: call(317, 1, 0, block))
""",
    ),
    code(
        "uses other numbers of system calls",
        "seccomp, which ends a process that uses another ABI",
        "lost",
        """
for number in range(436, 470):
    if number not in (439,):
        attempt(f"new {number}", lambda: call(number, -1, 0, 0, 0, 0))
for number in (41, 57, 59, 101):
    attempt(f"x32 {number}", lambda: call(0x40000000 + number, 0, 0, 0, 0))
""",
    ),
    code(
        "shares memory",
        "seccomp, landlock",
        "printed",
        """
def posix():
    if libc.shm_open(b"/headrace_made", os.O_CREAT | os.O_RDWR, 0o666) < 0: raise OSError(ctypes.get_errno())
attempt("System V", lambda: call(29, 0x1234, 4096, 0o1666))
attempt("messages", lambda: call(68, 0x1234, 0o1666))
attempt("semaphores", lambda: call(64, 0x1234, 1, 0o1666))
attempt("queue", lambda: call(240, b"made", os.O_CREAT | os.O_RDWR, 0o666, 0))
attempt("posix", posix)
attempt("memfd", lambda: os.memfd_create("made"))
attempt("secret", lambda: call(447, 0))
attempt("splice", lambda: call(276, channel(), 1, 64, 0))
attempt("eventfd", lambda: os.eventfd(0))
attempt("pipe", os.pipe)
""",
    ),
]
