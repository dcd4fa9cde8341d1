"""What interprocess CUDA events do when a process dies: the experiment behind 0007-fences.md.

    python3 docs/adr/0007-fences.py        # needs one GPU; takes about a minute

Two processes, each with a context of its own, obey one line at a time. The parent calls no CUDA. `owner` stands for the
daemon (it allocates and exports), `user` for the client. A spin kernel stands for work that is not over.
"""

import ctypes
import json
import select
import signal
import subprocess
import sys
import time

NAMES = {0: "SUCCESS", 600: "NOT_READY"}
PTX = rb"""
.version 7.0
.target sm_80
.address_size 64
.visible .entry spin(.param .u64 ns, .param .u64 out)
{
    .reg .u64 %t<6>;
    .reg .pred %p<3>;
    ld.param.u64 %t1, [ns];
    ld.param.u64 %t2, [out];
    mov.u64 %t3, %globaltimer;
AGAIN:
    mov.u64 %t4, %globaltimer;
    sub.u64 %t5, %t4, %t3;
    setp.lt.u64 %p1, %t5, %t1;
    @%p1 bra AGAIN;
    setp.eq.u64 %p2, %t2, 0;
    @%p2 bra END;
    st.global.u64 [%t2], %t1;
END:
    ret;
}
"""


class Handle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * 64)]

    def hex(self):
        return bytes(memoryview(self)).hex()


class Worker:
    """One context. Every command returns what it found, codes by name."""

    def __init__(self):
        self.cu = ctypes.CDLL("libcuda.so.1")
        self.made = {}
        device, context, module, spin = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        self.must("cuInit", 0)
        self.must("cuDeviceGet", ctypes.byref(device), 0)
        self.must("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.must("cuCtxSetCurrent", context)
        self.must("cuModuleLoadData", ctypes.byref(module), PTX)
        self.must("cuModuleGetFunction", ctypes.byref(spin), module, b"spin")
        self.spin_kernel = spin

    def call(self, name, *arguments):
        code = getattr(self.cu, name)(*arguments)
        if code not in NAMES:
            text = ctypes.c_char_p()
            self.cu.cuGetErrorName(code, ctypes.byref(text))
            NAMES[code] = (text.value or b"?").decode().removeprefix("CUDA_ERROR_")
        return NAMES[code]

    def must(self, name, *arguments):
        found = self.call(name, *arguments)
        assert found == "SUCCESS", f"{name}: {found}"

    def make(self, key, name, *arguments):
        self.made[key] = ctypes.c_void_p()
        return self.call(name, ctypes.byref(self.made[key]), *arguments)

    def stream(self, key):
        return self.make(key, "cuStreamCreate", 1)

    def event(self, key):
        return self.make(key, "cuEventCreate", 2 | 4)

    def alloc(self, key, size):
        return self.make(key, "cuMemAlloc_v2", ctypes.c_size_t(size))

    def fill(self, key, byte, size):
        return self.call("cuMemsetD8_v2", self.made[key], ctypes.c_ubyte(byte), ctypes.c_size_t(size))

    def free(self, key):
        return self.call("cuMemFree_v2", self.made[key])

    def export(self, key, kind):
        handle = Handle()
        self.must(f"cuIpcGet{kind}Handle", ctypes.byref(handle), self.made[key])
        return handle.hex()

    def open_event(self, key, handle):
        return self.make(key, "cuIpcOpenEventHandle", Handle.from_buffer_copy(bytes.fromhex(handle)))

    def open_memory(self, key, handle):
        return self.make(key, "cuIpcOpenMemHandle_v2", Handle.from_buffer_copy(bytes.fromhex(handle)), 1)

    def close_memory(self, key):
        return self.call("cuIpcCloseMemHandle", self.made[key])

    def destroy(self, key):
        return self.call("cuEventDestroy_v2", self.made[key])

    def destroy_stream(self, key):
        return self.call("cuStreamDestroy_v2", self.made[key])

    def spin(self, stream, ms, out=None):
        duration = ctypes.c_uint64(int(ms * 1e6))
        at = ctypes.c_uint64(self.made[out].value if out else 0)
        arguments = (ctypes.c_void_p * 2)(ctypes.addressof(duration), ctypes.addressof(at))
        one = ctypes.c_uint(1)
        return self.call(
            "cuLaunchKernel", self.spin_kernel, one, one, one, one, one, one, 0, self.made[stream], arguments, None
        )

    def record(self, event, stream):
        return self.call("cuEventRecord", self.made[event], self.made[stream])

    def wait(self, stream, event):
        return self.call("cuStreamWaitEvent", self.made[stream], self.made[event], 0)

    def query(self, event):
        return self.call("cuEventQuery", self.made[event])

    def finish(self, stream):
        return self.call("cuStreamSynchronize", self.made[stream])

    def poll(self, event, seconds):
        """Until the query says something else than NOT_READY, or `seconds` are over."""
        start = time.monotonic()
        while (found := self.query(event)) == "NOT_READY" and time.monotonic() - start < seconds:
            time.sleep(0.0005)
        return f"{found} after {(time.monotonic() - start) * 1e3:.0f} ms"

    def bytes(self, key, size):
        to = ctypes.create_string_buffer(size)
        found = self.call("cuMemcpyDtoH_v2", to, self.made[key], ctypes.c_size_t(size))
        return f"{found} {sorted(set(to.raw))}"

    def free_mib(self):
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.must("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value >> 20

    def cost(self, name, *keys):
        """Median microseconds of a call on what `keys` made, of 2000."""
        function, arguments = getattr(self.cu, name), [self.made[key] if key else 0 for key in keys]
        times = []
        for _ in range(2000):
            start = time.perf_counter_ns()
            function(*arguments)
            times.append(time.perf_counter_ns() - start)
        return f"{sorted(times)[1000] / 1e3:.2f} us, p99 {sorted(times)[1980] / 1e3:.2f}"

    def ping(self, *_):
        return "alive"


class Process:
    """A worker in a process of its own: its methods, over a pipe."""

    def __init__(self):
        self.child = subprocess.Popen(
            [sys.executable, __file__, "worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __getattr__(self, name):
        return lambda *arguments: self.ask(name, *arguments)

    def ask(self, name, *arguments, limit=8):
        self.child.stdin.write(json.dumps([name, *arguments]) + "\n")
        self.child.stdin.flush()
        if not select.select([self.child.stdout], [], [], limit)[0]:
            return f"{name} HANGS (longer than {limit} s)"
        return json.loads(self.child.stdout.readline() or '"died"')

    def kill(self):
        self.child.send_signal(signal.SIGKILL)
        start = time.monotonic()
        self.child.wait()
        return f"reaped after {(time.monotonic() - start) * 1e3:.0f} ms"


def pair():
    """Owner and user: memory of 4 MiB of 7s, an event of each, opened by the other."""
    owner, user = Process(), Process()
    for process in (owner, user):
        process.stream("s")
        process.stream("other")
        process.event("mine")
        process.event("local")
    owner.alloc("memory", 4 << 20)
    owner.fill("memory", 7, 4 << 20)
    for said in (
        user.open_memory("memory", owner.export("memory", "Mem")),
        user.open_event("theirs", owner.export("mine", "Event")),
        owner.open_event("theirs", user.export("mine", "Event")),
    ):
        assert said == "SUCCESS", said
    return owner, user


def say(part, what, found):
    print(f"{part} | {what} | {found}", flush=True)


def follows():
    owner, user = pair()
    say("a", "imported, before any record", owner.query("theirs"))
    for turn in ("first", "second", "third"):
        user.spin("s", 300)
        user.record("mine", "s")
        say("a", f"{turn} record, kernel of 300 ms runs", owner.query("theirs"))
        say("a", f"{turn} record, polled", owner.poll("theirs", 3))
    user.spin("s", 200)
    user.record("mine", "s")
    user.spin("s", 600)
    user.record("mine", "s")
    say("a", "two records (200 ms, 600 ms more), polled", owner.poll("theirs", 3))
    say("f", "cuEventQuery, imported, done", owner.cost("cuEventQuery", "theirs"))
    say("f", "cuEventQuery, own", owner.cost("cuEventQuery", "mine"))
    say("f", "cuStreamWaitEvent, imported, done", owner.cost("cuStreamWaitEvent", "s", "theirs", None))
    say("f", "cuEventRecord, own interprocess", owner.cost("cuEventRecord", "mine", "s"))
    user.spin("s", 1500)
    user.record("mine", "s")
    say("f", "cuEventQuery, imported, pending", owner.cost("cuEventQuery", "theirs"))
    say("f", "destroying an imported event while it is pending", owner.destroy("theirs"))
    say("f", "then the event of its maker", user.poll("mine", 4))
    for process in (owner, user):
        process.kill()


def dies(part, victim_is_user, waits, kernels):
    """Kills one process with a record behind `kernels` of 1.5 s each; the other asks, and waits on a stream if `waits`."""
    owner, user = pair()
    victim, other = (user, owner) if victim_is_user else (owner, user)
    who = "user" if victim_is_user else "owner"
    for _ in range(kernels):
        victim.spin("s", 1500)
    victim.record("mine", "s")
    text = f"{who} killed 200 ms into {kernels} kernel(s) of 1.5 s, then its record"
    if waits:
        other.wait("s", "theirs")
        other.record("local", "s")
    time.sleep(0.2)
    say(part, f"{text}: before", other.query("theirs"))
    say(part, f"{text}: the kill", victim.kill())
    say(part, f"{text}: other side's query", other.poll("theirs", 5))
    if waits:
        say(part, f"{text}: other side's stream that waits", other.poll("local", 5))
    else:
        say(part, f"{text}: a stream told to wait after the death", other.wait("s", "theirs"))
        other.record("local", "s")
        say(part, f"{text}: that stream", other.poll("local", 5))
    other.spin("other", 5)
    say(part, f"{text}: another stream of it", other.ask("finish", "other"))
    say(part, f"{text}: destroying the event and the stream", [other.destroy("theirs"), other.destroy_stream("s")])
    other.kill()


def survives():
    owner, user = pair()
    owner.spin("s", 10)
    owner.record("mine", "s")
    user.poll("theirs", 1)
    free = user.free_mib()
    say("d", "owner killed, its record done", owner.kill())
    say("d", "read its memory", user.bytes("memory", 4096))
    say("d", "query its event", user.query("theirs"))
    say("d", "wait for its event", user.wait("s", "theirs"))
    say("d", "write its memory by a kernel", user.spin("s", 1, "memory"))
    say("d", "own event behind that", [user.record("mine", "s"), user.poll("mine", 2)])
    say("d", "close the memory, destroy the event", [user.close_memory("memory"), user.destroy("theirs")])
    say("d", "free MiB before the kill, after the close", [free, user.free_mib()])
    user.kill()


def frees():
    owner, user = pair()
    before = owner.free_mib()
    say("e", "owner frees while user has it open", owner.free("memory"))
    say("e", "free MiB before, after", [before, owner.free_mib()])
    say("e", "user reads", user.bytes("memory", 4096))
    say("e", "owner allocates as much and fills it with 9", [owner.alloc("next", 4 << 20), owner.fill("next", 9, 4 << 20)])
    say("e", "user reads", user.bytes("memory", 4096))
    say("e", "user closes", user.close_memory("memory"))
    say("e", "free MiB", owner.free_mib())
    for process in (owner, user):
        process.kill()


def work():
    worker = Worker()
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, name)(*arguments)), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["worker"]:
        work()
    else:
        follows()
        dies("b", True, False, 1)
        dies("b", True, False, 2)
        dies("b", True, True, 1)
        dies("b", True, True, 2)
        dies("c", False, True, 1)
        dies("c", False, True, 2)
        survives()
        frees()
