"""Decoding in a child process: the same bits, limits that hold, and a child that can harm nobody."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import errno
import fcntl
import multiprocessing
import os
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import formats
from fedvfm.data.decoding import decoder, landlock, message
from fedvfm.data.sources import folder
from fedvfm.data.volumes import header as headers
from fedvfm.data.volumes import nifti, volumes
from tests.data import dicom_writer as writer

MIB = 1 << 20


# --- what a file could make a decoder do; the child imports this module only where a test asks for it ---------------


@decoder.apart
def eat(path: Path, mib: int) -> NDArray[np.uint8]:
    return np.ones(mib * MIB, np.uint8)


@decoder.apart
def spin(path: Path) -> int:
    while True:
        pass


@decoder.apart
def sleep(path: Path, seconds: float) -> int:
    time.sleep(seconds)
    return 0


@decoder.apart
def die(path: Path, number: int) -> int:
    os.kill(os.getpid(), number)
    return 0


@decoder.apart
def die_once(path: Path, number: int) -> int:
    """As where the system, short of memory, ends a process that did nothing."""
    name = f"{path}.{os.getppid()}"
    del name
    if resource.getrlimit(resource.RLIMIT_FSIZE)[0] == 0 and path.stat().st_mode & 0o200:
        path.chmod(0o400)
        os.kill(os.getpid(), number)
    return 7


@decoder.apart
def surroundings(path: Path) -> tuple[tuple[str, ...], int, int, bool]:
    """Names in the environment, core size, and whether a process can be started and a file written."""
    try:
        path.with_name("written").write_bytes(b"x")
        wrote = path.with_name("written").stat().st_size > 0
    except OSError:
        wrote = False
    return tuple(os.environ), resource.getrlimit(resource.RLIMIT_CORE)[0], os.getpid(), wrote


@decoder.apart
def wrong(path: Path) -> tuple[int, str]:
    return ("no number", 3)  # type: ignore[return-value]


@decoder.apart
def breaks(path: Path) -> int:
    raise ZeroDivisionError("Mustermann^Erika")


@decoder.apart
def same(
    path: Path, array: NDArray[Any], pair: tuple[int, float | None], words: tuple[str, ...], at: headers.Frame
) -> tuple[NDArray[Any], tuple[int, float | None], tuple[str, ...], headers.Frame]:
    return array, pair, words, at


@pytest.fixture(autouse=True)
def fresh() -> Any:
    """The limits of other tests afterwards."""
    yield
    decoder.limit(schema.DecodingLimits())


@pytest.fixture
def small() -> None:
    decoder.limit(schema.DecodingLimits(memory_mib=128, seconds=1))


def picture(path: Path, size: int = 16) -> Path:
    values = np.random.default_rng(0).integers(0, 256, (size, size), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def refused(call: Any, *args: Any) -> errors.DataError:
    with pytest.raises(errors.DataError) as caught:
        call(*args)
    assert str(args[0]) in str(caught.value)
    return caught.value


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["<i2", ">i2", "|u1", "<f4", "<f8", "|b1", "<i8"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (0, 4), (1,), ()])
def test_arrays_travel_with_their_bytes_and_axes(tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 2, shape).astype(kind)
    for array in (values, np.asfortranarray(values), values.T, values[::-1] if shape else values):
        given = (1, None if shape else float("inf")), ("a\udcff", "=1\n"), headers.Frame(tmp_path, padding=(-1, 2))
        back, *others = same(tmp_path, array, *given)
        np.testing.assert_array_equal(back, array)
        assert (back.dtype.str, tuple(others)) == (array.dtype.str, given)
        assert back.flags.f_contiguous == array.copy(order="K").flags.f_contiguous


def test_pictures_and_volumes_are_bit_equal_to_decoding_here(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    writer.series(tmp_path / "study", np.arange(192, dtype=np.int16).reshape(8, 8, 3), np.eye(4))
    here, apart = [], []
    for found in (here, apart):
        volumes._volumes.clear()
        volumes._headers.clear()
        with decoder.trusted() if found is here else decoder._borrowed():
            volume = volumes.read_volume(tmp_path / "study")
            found += [formats.read_image(path), formats.read_mask(path), volume.voxels, volume.grid.affine]
    for one, two in zip(here, apart, strict=True):
        assert (one.dtype, one.strides, one.tobytes()) == (two.dtype, two.strides, two.tobytes())


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.files(
    "harm",
    "what takes too much memory to decode",
    "",
    "4096 MiB, `[data.limits] memory_mib`, in a process of its own",
)
def test_too_much_memory_is_a_fault_of_the_file(tmp_path: Path, small: None) -> None:
    assert eat(tmp_path, 32).nbytes == 32 * MIB
    error = refused(eat, tmp_path, 512)
    assert error.code == "decoding-memory"
    assert "128 MiB" in str(error)
    assert eat(tmp_path, 1).nbytes == MIB


def test_an_answer_that_is_larger_than_the_limit_is_not_taken(tmp_path: Path) -> None:
    decoder.limit(schema.DecodingLimits(memory_mib=4096))
    eat(tmp_path, 1)
    decoder._state.idle[0].limits = schema.DecodingLimits(memory_mib=64)
    assert refused(eat, tmp_path, 80).code == "decoder-died"


@pytest.mark.files(
    "harm",
    "what takes too long to decode",
    "",
    "300 s of computing, `[data.limits] seconds`",
)
def test_too_much_time_is_a_fault_of_the_file(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "PATIENCE", 300)
    assert refused(spin, tmp_path).code == "decoding-time"
    assert sleep(tmp_path, 0.0) == 0


def test_a_file_that_hangs_is_a_fault_of_the_file(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sleep(tmp_path, 0.0)
    monkeypatch.setattr(decoder, "PATIENCE", 0.3)
    assert refused(sleep, tmp_path, 600.0).code == "decoding-time"


def test_time_is_that_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that has decoded for long has as much time for the next file as a new one."""
    decoder.limit(schema.DecodingLimits(seconds=1))
    monkeypatch.setattr(decoder, "PATIENCE", 300)  # a busy machine is slow by the clock
    for _ in range(3):
        pids = {surroundings(tmp_path)[2]}
        burn(tmp_path, 0.7)
        assert {surroundings(tmp_path)[2]} == pids


@decoder.apart
def burn(path: Path, seconds: float) -> int:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return 0


@pytest.mark.files(
    "harm",
    "what its decoder dies of",
    "",
    "a fault of that file alone",
)
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_a_file_that_kills_its_decoder_ends_nothing_else(tmp_path: Path, number: int) -> None:
    error = refused(die, tmp_path, int(number))
    assert error.code == "decoder-died"
    assert signal.Signals(number).name in str(error)
    assert sleep(tmp_path, 0.0) == 0


def test_a_decoder_that_somebody_else_ends_is_asked_once_more(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    assert die_once(path, int(signal.SIGKILL)) == 7
    assert refused(die, tmp_path, int(signal.SIGKILL)).code == "decoder-died"


def test_a_picture_that_ends_the_child_is_one_fault_of_a_folder(tmp_path: Path, small: None) -> None:
    """No mock: the pixels of a large picture do not fit into the memory that is allowed."""
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
        for name, side in (("a", 16), ("b", 8000)):
            Image.new("L", (side, side)).save(tmp_path / part / f"{name}.png")
    limits = {"memory_mib": 64}
    source = folder.Folder(
        schema.SourceConfig.model_validate({"source": "folder", "path": str(tmp_path), "limits": limits})
    )
    good, bad = source.samples()
    assert source.read(good).image.shape == (1, 16, 16)
    with pytest.raises(errors.DataError) as caught:
        source.read(bad)
    assert caught.value.code == "decoding-memory"
    assert source.read(good).image.shape == (1, 16, 16)


def test_voxels_that_lie_as_they_are_have_the_same_limit(tmp_path: Path, small: None) -> None:
    """A file of holes, of a few hundred bytes on the disk; it is read in this process, where nothing else bounds it."""
    whole = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)).to_bytes()[:352]
    (tmp_path / "a.nii").write_bytes(whole[:42] + np.array([600, 600, 600], "<i2").tobytes() + whole[48:])
    os.truncate(tmp_path / "a.nii", 352 + 600**3)
    header = nifti.read_header(tmp_path / "a.nii")
    with pytest.raises(errors.DataError) as caught:
        nifti.read_voxels(header)
    assert caught.value.code == "decoding-memory"
    with decoder.trusted():
        assert decoder.may_take(600**3)


def test_every_folder_has_its_own_limits(tmp_path: Path) -> None:
    """The sites of one process: the last that was opened does not say what the others may take."""
    sources = []
    for name, mib in (("a", 64), ("b", 128)):
        for part in ("images", "masks"):
            (tmp_path / name / part).mkdir(parents=True)
            Image.new("L", (16, 16)).save(tmp_path / name / part / "x.png")
        given = {"source": "folder", "path": str(tmp_path / name), "limits": {"memory_mib": mib}}
        sources.append((folder.Folder(schema.SourceConfig.model_validate(given)), mib))
    for source, mib in sources:
        source.read(source.samples()[0])
        assert {child.limits.memory_mib for child in decoder._state.idle} == {mib}


# --- what a child has and can do --------------------------------------------------------------------------------------


@pytest.mark.files(
    "harm",
    "what takes its decoder over",
    "",
    "no key and no environment in its memory; answers are checked by type, never unpickled; by Landlock (Linux 5.13; "
    "6.12 for all of it) no file to write or remove, no program, no TCP, no look into other processes; files that "
    "this user can read it can read",
)
def test_a_child_has_no_secrets_and_writes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDVFM_PASSWORD", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    decoder.close()
    names, core, pid, wrote = surroundings(tmp_path / "a")
    assert not [name for name in names if "SECRET" in name or "FEDVFM" in name or name in ("HOME", "PATH", "USER")]
    assert core == 0
    assert pid != os.getpid()
    assert not wrote


@decoder.apart
def reach(path: Path, parent: int) -> tuple[str, ...]:
    """What a child that is taken over gets done."""
    tries = {
        "remove": path.unlink,
        "make": path.with_name("new").touch,
        "rename": lambda: path.rename(path.with_name("other")),
        "cut": lambda: os.truncate(path, 0),
        "environment": Path(f"/proc/{parent}/environ").read_bytes,
        "memory": lambda: Path(f"/proc/{parent}/mem").open("rb").close(),
        "signal": lambda: os.kill(parent, 0),
        "program": lambda: os.execv("/bin/true", ["true"]),
        "connect": lambda: socket.create_connection(("127.0.0.1", 9), 1),
    }
    done = []
    for name, action in tries.items():
        try:
            action()
            done.append(name)
        except ConnectionRefusedError:
            done.append(name)
        except OSError:
            continue
    return tuple(done)


@pytest.mark.skipif(landlock.version() < 6, reason="this kernel's Landlock does not know all of it")
def test_a_child_that_is_taken_over_reaches_nothing(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    before = path.read_bytes()
    assert reach(path, os.getpid()) == ()
    assert (path.read_bytes(), len(list(tmp_path.iterdir()))) == (before, 1)


def test_what_a_reader_breaks_with_is_not_quoted(tmp_path: Path) -> None:
    error = refused(breaks, tmp_path)
    assert error.code == "reader-failed"
    assert "Mustermann" not in str(error)


def test_an_answer_of_another_type_is_refused(tmp_path: Path) -> None:
    assert refused(wrong, tmp_path).code == "decoder-died"
    assert sleep(tmp_path, 0.0) == 0


HOSTILE = {
    "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    "another magic": message.HEAD.pack(b"FVD1", message.VALUE, 0, 2, 0) + b"{}",
    "another kind": message.HEAD.pack(message.MAGIC, message.REQUEST, 0, 2, 0) + b"{}",
    "a long text": message.HEAD.pack(message.MAGIC, message.VALUE, 0, 1 << 60, 0),
    "a large array": message.HEAD.pack(message.MAGIC, message.VALUE, 0, 2, 1 << 60),
}
TEXTS = {
    "no JSON": b"{",
    "no object": b"[1]",
    "deep": b"[" * 200_000,
    "a number": b"7",
    "nothing": b"{}",
    "objects": b'{"value": {"array": 0}, "arrays": [["|O", [1], [0]]]}',
    "a record": b'{"value": {"array": 0}, "arrays": [["i4,i4", [1], [0]]]}',
    "negative sides": b'{"value": {"array": 0}, "arrays": [["<i4", [-1, -2], [0, 1]]]}',
    "huge sides": b'{"value": {"array": 0}, "arrays": [["<i4", [99999999999, 99999999999], [0, 1]]]}',
    "wrong axes": b'{"value": {"array": 0}, "arrays": [["<i4", [0, 0], [0, 0]]]}',
    "another array": b'{"value": {"array": 1}, "arrays": [["|u1", [0], [0]]]}',
    "no array": b'{"value": 3, "arrays": []}',
    "true for one": b'{"value": {"array": true}, "arrays": [["|u1", [0], [0]], ["|u1", [0], [0]]]}',
}
HOSTILE |= {
    name: message.HEAD.pack(message.MAGIC, message.VALUE, 0, len(text), 0) + text for name, text in TEXTS.items()
}


@pytest.mark.parametrize("name", HOSTILE)
def test_answers_that_are_none(name: str) -> None:
    read, write = os.pipe()
    try:
        content = HOSTILE[name]
        fill = multiprocessing.get_context("fork").Process(target=_write, args=(write, content))
        fill.start()
        os.close(write)
        with pytest.raises((message.Malformed, message.Ended)):
            message.receive(read, {message.VALUE: NDArray[np.uint8]}, MIB, time.monotonic() + 20)
    finally:
        os.close(read)
        fill.join()


def _write(pipe: int, content: bytes) -> None:
    view = memoryview(content)
    try:
        while view:
            view = view[os.write(pipe, view) :]
    except BrokenPipeError:
        pass
    os._exit(0)


def test_no_object_is_ever_unpickled() -> None:
    root = Path(message.__file__).parent
    assert not [path.name for path in root.glob("*.py") if "pickle" in path.read_text().replace("unpickled", "")]


# --- life of a child --------------------------------------------------------------------------------------------------


def test_one_child_decodes_many_files_and_threads_have_their_own(tmp_path: Path) -> None:
    assert len({surroundings(tmp_path / "a")[2] for _ in range(5)}) == 1
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        values = list(pool.map(lambda number: same(tmp_path, np.full(9, number), (number, None), (), FRAME), range(40)))
    assert [int(one[0][0]) for one in values] == list(range(40))


FRAME = headers.Frame(Path("a"))


def test_errors_in_between_leave_no_answers_behind(tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{number}.png") for number in range(6)]
    paths[2].write_bytes(b"nothing")
    with pytest.raises(errors.DataError, match=r"2\.png"):
        list(formats.load.each((path, False) for path in paths))
    child = surroundings(tmp_path / "a")[2]
    with pytest.raises(errors.DataError, match=r"2\.png"):
        list(formats.load.each((path, False) for path in paths))
    iterator = formats.load.each((path, False) for path in paths)
    next(iterator)
    assert formats.load(paths[5], True).values.shape == (16, 16)  # while the other is not finished
    iterator.close()
    assert surroundings(tmp_path / "a")[2] == child or len(decoder._state.idle) <= 2


def test_a_forked_process_has_a_child_of_its_own(tmp_path: Path) -> None:
    own = surroundings(tmp_path / "a")[2]
    forks = multiprocessing.get_context("fork")
    queue = forks.SimpleQueue()
    process = forks.Process(target=lambda: (queue.put(surroundings(tmp_path / "a")[2]), decoder.close()))
    process.start()
    other = queue.get()
    process.join()
    assert other != own
    assert surroundings(tmp_path / "a")[2] == own


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    forks = multiprocessing.get_context("fork")
    queue = forks.SimpleQueue()

    def work() -> None:
        queue.put(surroundings(tmp_path / "a")[2])
        os.kill(os.getpid(), signal.SIGKILL)

    process = forks.Process(target=work)
    process.start()
    child = queue.get()
    process.join()
    deadline = time.monotonic() + 30
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_signals_to_stop_are_the_parents_business(tmp_path: Path) -> None:
    child = surroundings(tmp_path / "a")[2]
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(child, number)
    assert surroundings(tmp_path / "a")[2] == child


def test_a_child_that_cannot_start_is_no_fault_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder.close()
    for path in ("/nonexistent/python", "/bin/false"):
        monkeypatch.setattr(decoder.sys, "executable", path)
        with pytest.raises(errors.DecoderError) as caught:
            sleep(tmp_path, 0.0)
        assert caught.value.code == "decoder"


@pytest.mark.parametrize("times", [1, 2])
def test_whoever_is_interrupted_gets_no_answer_of_before(tmp_path: Path, times: int) -> None:
    """As who presses Ctrl-C in a notebook and goes on: the answer that comes late is nobody's."""
    assert echo(tmp_path, 0.0, 1) == 1
    with pytest.raises(KeyboardInterrupt), interrupted(times):
        echo(tmp_path, 1.0, 2)
    time.sleep(0.2)
    assert [echo(tmp_path, 0.0, number) for number in (3, 4)] == [3, 4]


def test_whoever_stops_early_gets_no_answer_of_before(tmp_path: Path) -> None:
    iterator = echo.each((tmp_path, 0.0, number) for number in range(9))
    assert next(iterator) == 0
    iterator.close()
    assert echo(tmp_path, 0.0, 10) == 10


def test_an_answer_with_another_number_is_not_taken(tmp_path: Path) -> None:
    assert echo(tmp_path, 0.0, 1) == 1
    child = decoder._state.idle[0]
    waiting: Any = collections.deque()
    child._ask(waiting, child._packed(echo, (tmp_path, 0.0, 2)))
    child.usable = True  # as if nobody had noticed
    assert refused(echo, tmp_path, 0.0, 3).code == "decoder-died"
    assert echo(tmp_path, 0.0, 4) == 4


def test_a_decoder_that_was_dead_before_does_not_count_against_a_file(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    echo(path, 0.0, 1)
    child = decoder._state.idle[0]._process
    child.kill()
    child.wait()
    assert die_once(path, int(signal.SIGKILL)) == 7
    path.chmod(0o600)
    assert die_once(path, int(signal.SIGKILL)) == 7  # every file is tried twice, not every child


@pytest.mark.parametrize("what", ["subprocess.Popen", "os.pipe"])
def test_a_failed_restart_leaves_nothing_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Descriptors that were closed are soon those of another file, as the audit log."""
    echo(tmp_path, 0.0, 1)

    def fails(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr(f"fedvfm.data.decoding.decoder.{what}", fails)
        with pytest.raises(errors.DecoderError):
            die(tmp_path, int(signal.SIGKILL))
    assert not decoder._state.idle
    with (tmp_path / "a").open("wb") as one, (tmp_path / "b").open("wb") as other:
        assert echo(tmp_path, 0.0, 2) == 2
        assert one.tell() == other.tell() == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == b""


@pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="only Linux says how large a pipe is")
def test_neither_end_waits_for_the_other_where_pipes_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user who has many pipes: the kernel gives one page."""
    real = os.pipe

    def small_pipe() -> tuple[int, int]:
        read, write = real()
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, decoder.PAGE)
        return read, write

    decoder.close()
    monkeypatch.setattr(decoder.os, "pipe", small_pipe)
    monkeypatch.setattr(decoder, "PIPE_BYTES", decoder.PAGE)
    decoder.limit(schema.DecodingLimits(seconds=20))
    array = np.arange(30_000)
    requests = [(tmp_path, array, (number, None), ("x" * 3000 * (number % 3),), FRAME) for number in range(12)]
    answers = [back[1][0] for back in same.each(requests)]
    assert answers == list(range(12))


def test_a_package_that_is_missing_is_no_fault_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "nrrd.py").write_text("raise ModuleNotFoundError('No module', name='nrrd')\n")
    path = tmp_path / "a.nrrd"
    path.write_bytes(b"NRRD0004\n")
    decoder.close()
    monkeypatch.syspath_prepend(tmp_path / "lib")
    with pytest.raises(errors.MissingExtra, match="pynrrd"):
        volumes.read_header(path)
    decoder.close()


@decoder.apart
def echo(path: Path, seconds: float, number: int) -> int:
    time.sleep(seconds)
    return number


@contextlib.contextmanager
def interrupted(times: int) -> Iterator[None]:
    """Signals of the keyboard while something runs, one shortly after the other."""

    def press() -> None:
        for _ in range(times):
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(KeyboardInterrupt):
            thread.join()


def test_the_head_of_a_message_is_as_documented() -> None:
    assert struct.calcsize("<4sBIQQ") == message.HEAD.size == 25
