"""Remote shards, from fsspec's memory and from a local web server that fails in many ways, through the cache."""

import copy
import errno
import fcntl
import io
import os
import signal
import tarfile
import threading
import time
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from imagen_lightning.cli.main import main
from imagen_lightning.data import remote as remote_module
from imagen_lightning.data.index import index_shard, open_index
from imagen_lightning.data.remote import attempt, expand_addresses, is_remote
from imagen_lightning.data.shard_cache import CacheFull, ReadAhead, ShardCache
from imagen_lightning.data.shards import CAPTION, IMAGE, Shards, list_shards, open_shards
from imagen_lightning.types import InputError

NUM_SHARDS, NUM_SAMPLES = 6, 4


def picture(number):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 5, 5)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(folder, num=NUM_SHARDS):
    """Shards of equal size; sample n's picture and caption show n."""
    for shard in range(num):
        with tarfile.open(folder / f"train-{shard:02d}.tar", "w") as tar:
            for number in range(shard * NUM_SAMPLES, (shard + 1) * NUM_SAMPLES):
                for suffix, data in (("png", picture(number)), ("txt", b"number %03d" % number)):
                    info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


class Server(ThreadingHTTPServer):
    """Serves a folder; `mischief` maps a file's name to what befalls the next answers for it, one after the other."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.mischief = {}
        self.requests = []
        self.address = f"http://127.0.0.1:{self.server_port}"

    def bodies(self):
        """Names of the files sent, in order."""
        return [name for method, name in self.requests if method == "GET" and name]

    def handle_error(self, request, client_address):
        pass  # clients that hang up


class Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.server.requests.append(("HEAD", self.path.lstrip("/")))
        super().do_HEAD()

    def do_GET(self):
        name = self.path.lstrip("/").split("?")[0]
        self.server.requests.append(("GET", name))
        waiting = self.server.mischief.get(name, [])
        kind = waiting.pop(0) if waiting else None
        if kind is None:
            super().do_GET()
        elif isinstance(kind, int):
            self.send_error(kind)
        else:
            data = bytearray(Path(self.directory, name).read_bytes())
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if kind == "flip":
                data[540] ^= 1
            elif kind == "cut":
                del data[len(data) // 2 :]
            elif kind == "hang":
                self.wfile.write(data[:1000])
                self.wfile.flush()
                time.sleep(3)
            elif kind == "slow":
                for start in range(0, len(data), 256):
                    self.wfile.write(data[start : start + 256])
                    self.wfile.flush()
                    time.sleep(0.05)
                return
            self.wfile.write(data)
            self.close_connection = True


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "web"
    folder.mkdir()
    with Server(write_shards(folder)) as web:
        threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
        yield web
        web.shutdown()


@pytest.fixture
def cache(tmp_path):
    made = ShardCache(tmp_path / "cache", 10**9, attempts=3, pause=0.01)
    made.prepare()
    return made


def captions(shards):
    return [
        shards.sample(shard, row)[CAPTION].decode()
        for shard, index in enumerate(shards.indexes)
        for row in range(index.num_samples)
    ]


EXPECTED = [f"number {number:03d}" for number in range(NUM_SHARDS * NUM_SAMPLES)]


def leftovers(cache):
    return [file.name for file in (cache.folder / "shards").iterdir() if file.suffix != ".tar"]


def size_of(cache):
    return sum(file.stat().st_size for file in (cache.folder / "shards").iterdir())


# ---- addresses


def test_addresses_are_told_from_paths():
    for text in ("https://h/a.tar", "s3://b/a.tar", "memory://a.tar", "simplecache::https://h/a.tar", "git+x://a"):
        assert is_remote(text)
    for text in ("a.tar", "/a/b.tar", "pipe:cat a.tar", "a:b.tar", "./a://b", "C:/a.tar"):
        assert not is_remote(text)


def test_addresses_expand_by_braces_globs_and_folders(server, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for name in ("train-00.tar", "train-01.tar", "val-00.tar", "train-00.tar.index"):
        memory.pipe(f"/b/{name}", b"")
    everything = [f"memory:///b/{name}" for name in ("train-00.tar", "train-01.tar", "val-00.tar")]
    assert expand_addresses("memory://b/*.tar") == everything
    assert expand_addresses("memory://b/") == everything
    assert expand_addresses("memory://b/{val,train}-0[01].tar") == [everything[2], *everything[:2]]
    assert list_shards(["s3://b/a-{08..10}.tar"]) == ["s3://b/a-08.tar", "s3://b/a-09.tar", "s3://b/a-10.tar"]
    here = [f"{server.address}/train-{number:02d}.tar" for number in range(NUM_SHARDS)]
    assert expand_addresses(f"{server.address}/train-*.tar") == here
    assert list_shards(f"{server.address}/") == here
    assert list_shards("https://h/{a,b}.tar?token=x*y") == ["https://h/a.tar?token=x*y", "https://h/b.tar?token=x*y"]
    local = tmp_path / "web" / "train-00.tar"
    assert list_shards([f"file://{local}", here[1]]) == [str(local), here[1]]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("memory://nothing/*.tar", "list nothing"),
        ("memory://b/{a,b.tar", "braces do not pair"),
        ("ftq://host/*.tar", "Protocol not known"),
        (["memory://b/a.tar", "memory://b/a.tar"], "named 2 times"),
    ],
)
def test_addresses_refused(pattern, message):
    with pytest.raises(InputError, match=message):
        list_shards(pattern)


@pytest.mark.parametrize(("address", "package"), [("s3://bucket/a.tar", "s3fs"), ("gs://bucket/a.tar", "gcsfs")])
def test_a_missing_backend_is_named(address, package, tmp_path):
    try:
        __import__(package)
    except ImportError:
        with pytest.raises(InputError, match=f"pip install {package} "):
            open_shards(address, cache=tmp_path)
    else:
        pytest.skip(f"{package} is installed")


# ---- attempts


def test_attempts_are_repeated_with_growing_pauses(monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    left = [OSError("reset"), TimeoutError(), EOFError("end")]

    def flaky():
        if left:
            raise left.pop(0)
        return 7

    assert attempt(flaky, "shard 'x'", 5, 0.5) == 7
    assert pauses == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("reset by peer"), r"shard 'x' cannot be read in 3 attempts: reset by peer"),
        (PermissionError("Access Denied"), r"shard 'x' cannot be read: Access Denied"),
        (OSError(errno.ENOSPC, "No space left on device"), r"cannot be read: \[Errno 28\] No space left"),
    ],
)
def test_attempts_end(error, message):
    calls = []

    def fail():
        calls.append(1)
        raise error

    with pytest.raises(InputError, match=message):
        attempt(fail, "shard 'x'", 3, 0)
    assert len(calls) == (3 if "3 attempts" in message else 1)


# ---- reading


def test_remote_samples_are_those_of_the_files(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for path in write_shards(tmp_path).glob("*.tar"):
        memory.pipe(f"/b/{path.name}", path.read_bytes())
    local = open_shards(tmp_path)
    remote = open_shards("memory://b/train-*.tar", cache=tmp_path / "cache", verify="sha256")
    for shard in range(NUM_SHARDS):
        assert remote.indexes[shard].stem == local.indexes[shard].stem
        for row in range(NUM_SAMPLES):
            assert remote.sample(shard, row) == local.sample(shard, row)
            assert remote.read(shard, row, IMAGE) == local.read(shard, row, IMAGE)
    memory.store.clear()  # what is in the cache needs no network
    addresses = [index.shard for index in remote.indexes]
    assert captions(open_shards(addresses, cache=tmp_path / "cache")) == EXPECTED
    assert len(list((tmp_path / "cache" / "indexes").iterdir())) == NUM_SHARDS


def test_faults_of_a_remote_shard_name_its_address(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    data = (write_shards(tmp_path, 1) / "train-00.tar").read_bytes()
    memory.pipe("/b/a.tar", data[:4000])
    index = open_shards("memory://b/a.tar", cache=tmp_path / "cache").indexes[0]
    assert {skip.shard for skip in index.skips} == {"memory://b/a.tar"}


def test_the_index_beside_a_remote_shard_is_used(server, tmp_path):
    web = tmp_path / "web"
    for number in range(NUM_SHARDS - 1):
        open_index(str(web / f"train-{number:02d}.tar"), hashes=True)
    open_index(str(web / "train-04.tar"), hashes=False, force=True)  # nothing to check a transfer by: not used
    (web / "train-03.tar.index").write_bytes(b"damaged")
    shards = open_shards(f"{server.address}/train-{{00..05}}.tar", cache=tmp_path / "cache")
    fetched = [name for name in server.bodies() if name.endswith(".tar")]
    assert sorted(fetched) == ["train-03.tar", "train-04.tar", "train-05.tar"]
    assert captions(shards) == EXPECTED
    server.requests.clear()
    assert captions(open_shards(f"{server.address}/train-{{00..05}}.tar", cache=tmp_path / "cache")) == EXPECTED
    assert not server.requests  # indexes and shards are in the cache


@pytest.mark.parametrize("kind", ["flip", "cut", 500, 503])
def test_a_transfer_that_goes_wrong_is_repeated(server, cache, tmp_path, kind):
    index = parse(server, cache, tmp_path)
    server.mischief["train-00.tar"] = [kind, kind]
    assert captions(Shards([index], cache=cache)) == EXPECTED[:4]
    assert server.bodies().count("train-00.tar") == 3
    assert not leftovers(cache)


def parse(server, cache, tmp_path, name="train-00.tar"):
    """The index of a served shard, taken from beside it; the shard is not fetched."""
    open_index(str(tmp_path / "web" / name), hashes=True)
    return cache.open_index(f"{server.address}/{name}")


@pytest.mark.parametrize(
    ("kind", "message", "attempts"),
    [
        ("flip", "cannot be read in 3 attempts: its samples are not those of its index", 3),
        ("cut", "cannot be read in 3 attempts", 3),
        (500, "cannot be read in 3 attempts: 500", 3),
        (403, "cannot be read: 403", 1),
        (404, "does not exist", 1),
    ],
)
def test_a_transfer_that_keeps_going_wrong_names_the_address(server, cache, tmp_path, kind, message, attempts):
    index = parse(server, cache, tmp_path)
    server.mischief["train-00.tar"] = [kind] * 10
    with pytest.raises(InputError, match=f"shard '{server.address}/train-00.tar' {message}"):
        Shards([index], cache=cache).sample(0, 0)
    assert server.bodies().count("train-00.tar") == attempts
    assert not list((cache.folder / "shards").iterdir())


def test_no_flipped_bit_of_a_member_survives_a_transfer(server, cache, tmp_path):
    index = parse(server, cache, tmp_path)
    path = tmp_path / "web" / "train-00.tar"
    data = path.read_bytes()
    places = [o + i for o, n in index.spans[:, :2].reshape(-1, 2).tolist() for i in range(0, n, 7)]
    once = ShardCache(cache.folder, cache.max_bytes, attempts=1)
    for number, place in enumerate(places):
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << number % 8)]) + data[place + 1 :])
        with pytest.raises(InputError, match="its samples are not those of its index"):
            once.open(index)
    assert len(places) > 40
    path.write_bytes(data)
    once.close(once.open(index))


def test_a_server_that_falls_silent_is_given_up(server, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_module, "_SILENCE", 0.3)
    index = parse(server, cache, tmp_path)
    server.mischief["train-00.tar"] = ["hang"]
    start = time.monotonic()
    assert captions(Shards([index], cache=cache)) == EXPECTED[:4]
    assert time.monotonic() - start < 2.5


def test_no_server_at_all(tmp_path):
    cache = ShardCache(tmp_path, 10**6, attempts=2, pause=0)
    cache.prepare()
    with pytest.raises(InputError, match=r"shard 'http://127.0.0.1:9/a.tar' cannot be read in 2 attempts"):
        cache.open_index("http://127.0.0.1:9/a.tar")


def test_a_shard_that_changed_after_it_was_indexed_is_refused_until_it_is_indexed_anew(server, tmp_path, capsys):
    web, folder = tmp_path / "web", tmp_path / "cache"
    address = f"{server.address}/train-00.tar"
    open_shards(address, cache=folder)
    (web / "train-00.tar").write_bytes((web / "train-01.tar").read_bytes())
    assert captions(open_shards(address, cache=folder)) == EXPECTED[:4]  # the cache has it as it was
    for file in (folder / "shards").iterdir():
        file.unlink()
    cache = ShardCache(folder, 10**9, attempts=2, pause=0)
    index = cache.open_index(address)
    with pytest.raises(
        InputError, match="if it has changed since it was indexed, run `imagen-lightning shards index --fo"
    ):
        cache.open(index)
    assert main(["shards", "index", address, "--force", "--cache", str(folder)]) == 0
    assert captions(open_shards(address, cache=folder)) == EXPECTED[4:8]
    assert main(["shards", "verify", address, "--cache", str(folder)]) == 0
    assert "1 shard, 4 samples: all as they were indexed" in capsys.readouterr().out


def test_a_cached_shard_cut_by_a_crash_is_fetched_again(server, cache, tmp_path):
    index = parse(server, cache, tmp_path)
    cache.close(cache.open(index))
    os.truncate(cache.path(index.shard), 3000)
    assert captions(Shards([index], cache=cache)) == EXPECTED[:4]


# ---- the bound


def test_the_cache_keeps_its_bound_and_the_last_used(server, tmp_path):
    size = (tmp_path / "web" / "train-00.tar").stat().st_size
    bounded = ShardCache(tmp_path / "cache", 3 * size + 100, pause=0.01)
    bounded.prepare()
    indexes = [parse(server, bounded, tmp_path, f"train-{number:02d}.tar") for number in range(NUM_SHARDS)]
    shards = Shards(indexes, cache=bounded)
    for shard in (0, 1, 2, 0, 3, 0, 4, 5, 0):
        assert shards.sample(shard, 0)[CAPTION].decode() == EXPECTED[shard * NUM_SAMPLES]
        shards.close()
        time.sleep(0.02)  # so that the order of use can be told
        assert size_of(bounded) <= bounded.max_bytes
    assert {number for number in range(NUM_SHARDS) if bounded.path(indexes[number].shard).exists()} == {0, 4, 5}
    assert Counter(name for name in server.bodies() if name.endswith(".tar"))["train-00.tar"] == 1


def test_shards_in_use_stay_and_a_full_cache_says_so(server, tmp_path):
    size = (tmp_path / "web" / "train-00.tar").stat().st_size
    bounded = ShardCache(tmp_path / "cache", 2 * size, pause=0.01)
    bounded.prepare()
    indexes = [parse(server, bounded, tmp_path, f"train-{number:02d}.tar") for number in range(4)]
    held = [bounded.open(index) for index in indexes[:2]]
    with pytest.raises(CacheFull, match="is full of shards in use; make it larger"):
        bounded.open(indexes[2])
    bounded.close(held[0])
    bounded.close(bounded.open(indexes[2]))
    assert not bounded.path(indexes[0].shard).exists()
    assert bounded.path(indexes[1].shard).exists()
    # a reader lets go of its own before it gives up
    bounded.close(held[1])
    reader = Shards(indexes, cache=bounded)
    assert captions(reader) == EXPECTED[: 4 * NUM_SAMPLES]
    assert size_of(bounded) <= bounded.max_bytes


def test_a_cache_too_small_is_refused_at_once(server, tmp_path):
    settings = {"cache": tmp_path / "cache", "cache_bytes": 30_000}
    with pytest.raises(InputError, match=r"does not hold the 4 shards .* raise cache_gb, or shuffle fewer together"):
        open_shards(f"{server.address}/train-{{00..05}}.tar", read_ahead=4, **settings)
    open_shards(f"{server.address}/train-{{00..05}}.tar", read_ahead=2, **settings)
    with pytest.raises(InputError, match="does not fit into a cache of 500"):
        open_shards(f"{server.address}/train-00.tar", cache=tmp_path / "other", cache_bytes=500)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache '.*file' cannot be written \(Not a directory\)"):
        open_shards("memory://b/a.tar", cache=tmp_path / "file")


# ---- several processes


def _read_all(arguments):
    folder, max_bytes, indexes, seed = arguments
    cache = ShardCache(folder, max_bytes, pause=0.01)
    shards = Shards(indexes, cache=cache)
    order = np.random.default_rng(seed).permutation(len(indexes) * 3) % len(indexes)
    found = []
    for shard in order.tolist():
        shards.prefetch([shard, (shard + 1) % len(indexes)])
        found += [(shard, row, shards.sample(shard, row)[CAPTION].decode()) for row in range(NUM_SAMPLES)]
        used = sum(file.stat().st_size for file in (folder / "shards").glob("*.tar") if file.exists())
        assert used <= max_bytes
    wait_for(lambda: shards._ahead._thread is None)  # before the pool ends it halfway
    return found


def test_processes_share_a_cache_that_is_too_small_for_all(server, tmp_path):
    size = (tmp_path / "web" / "train-00.tar").stat().st_size
    bounded = ShardCache(tmp_path / "cache", 5 * size, pause=0.01)
    bounded.prepare()
    indexes = [parse(server, bounded, tmp_path, f"train-{number:02d}.tar") for number in range(NUM_SHARDS)]
    with get_context("fork").Pool(3) as pool:
        jobs = [(bounded.folder, bounded.max_bytes, indexes, seed) for seed in range(3)]
        for found in pool.map(_read_all, jobs):
            assert len(found) == 3 * NUM_SHARDS * NUM_SAMPLES
            assert all(text == EXPECTED[shard * NUM_SAMPLES + row] for shard, row, text in found)
    assert size_of(bounded) <= bounded.max_bytes
    assert not leftovers(bounded)


def _hold(cache, index, ready, end):
    descriptor = cache.open(index)
    ready.set()
    end.wait(20)
    cache.close(descriptor)


def test_what_another_process_reads_is_not_thrown_out(server, tmp_path):
    size = (tmp_path / "web" / "train-00.tar").stat().st_size
    bounded = ShardCache(tmp_path / "cache", 2 * size, pause=0.01)
    bounded.prepare()
    indexes = [parse(server, bounded, tmp_path, f"train-{number:02d}.tar") for number in range(NUM_SHARDS)]
    context = get_context("fork")
    ready, end = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(bounded, indexes[0], ready, end))
    other.start()
    assert ready.wait(20)
    for index in indexes[1:]:
        bounded.close(bounded.open(index))
        assert bounded.path(indexes[0].shard).exists()
    end.set()
    other.join(20)
    for index in indexes[1:]:
        bounded.close(bounded.open(index))
    assert not bounded.path(indexes[0].shard).exists()


def _fetch_one(cache, index):
    cache.close(cache.open(index))


def test_processes_fetch_a_shard_once_together(server, cache, tmp_path):
    index = parse(server, cache, tmp_path)
    server.mischief["train-00.tar"] = ["slow"]
    others = [get_context("fork").Process(target=_fetch_one, args=(cache, index)) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join(20)
        assert other.exitcode == 0
    assert server.bodies().count("train-00.tar") == 1


def test_a_process_killed_while_it_fetches_leaves_nothing_in_the_way(server, tmp_path):
    size = (tmp_path / "web" / "train-00.tar").stat().st_size
    bounded = ShardCache(tmp_path / "cache", size + 10, pause=0.01)
    bounded.prepare()
    index, second = (parse(server, bounded, tmp_path, f"train-0{number}.tar") for number in range(2))
    server.mischief["train-00.tar"] = ["slow"]
    other = get_context("fork").Process(target=_fetch_one, args=(bounded, index))
    other.start()
    while not list((bounded.folder / "shards").glob("*.partial")):
        time.sleep(0.01)
    with pytest.raises(CacheFull):  # the room is taken as long as it lives
        bounded.open(second)
    os.kill(other.pid, signal.SIGKILL)
    other.join(20)
    assert not bounded.path(index.shard).exists()
    bounded.close(bounded.open(second))
    bounded.close(bounded.open(index))
    assert not leftovers(bounded)


# ---- reading ahead


def test_what_is_sent_to_another_process_opens_its_own_files(server, cache, tmp_path):
    shards = Shards([parse(server, cache, tmp_path)], cache=cache)
    shards.prefetch([0])
    assert captions(shards) == EXPECTED[:4]
    sent = copy.deepcopy(shards)  # as pickling does, by __getstate__
    assert not sent._files
    assert sent._ahead is None
    assert captions(sent) == EXPECTED[:4]


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_shards_are_fetched_ahead_in_order(server, cache, tmp_path):
    indexes = [parse(server, cache, tmp_path, f"train-{number:02d}.tar") for number in range(NUM_SHARDS)]
    shards = Shards(indexes, cache=cache)
    server.requests.clear()
    shards.prefetch([3, 1, 4])
    wait_for(lambda: cache.path(indexes[4].shard).exists())
    assert server.bodies() == ["train-03.tar", "train-01.tar", "train-04.tar"]
    assert shards.sample(4, 0)[CAPTION] == b"number 016"
    shards.prefetch([1, 0])  # lets go of shard 4, fetches 0
    wait_for(lambda: cache.path(indexes[0].shard).exists())
    assert server.bodies()[3:] == ["train-00.tar"]
    descriptor = os.open(cache.path(indexes[4].shard), os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


def test_reading_ahead_makes_no_room_among_what_is_wanted_and_fails_in_silence(server, tmp_path):
    size = (tmp_path / "web" / "train-00.tar").stat().st_size
    bounded = ShardCache(tmp_path / "cache", 3 * size, attempts=1)
    bounded.prepare()
    indexes = [parse(server, bounded, tmp_path, f"train-{number:02d}.tar") for number in range(NUM_SHARDS)]
    server.mischief["train-01.tar"] = [500]
    ahead = ReadAhead(bounded)
    ahead.want(indexes[:5])
    wait_for(lambda: ahead._thread is None)
    there = [number for number in range(NUM_SHARDS) if bounded.path(indexes[number].shard).exists()]
    assert there == [0, 2, 3]
    shards = Shards(indexes, cache=bounded)
    assert captions(shards) == EXPECTED


def batches(data, num):
    loader = iter(data.train_dataloader())
    found = [next(loader) for _ in range(num)]
    return [(batch.keys, batch.captions, batch.images.tolist()) for batch in found]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_on_remote_shards_sees_what_local_ones_give(server, tmp_path, num_workers):
    from imagen_lightning.data.datamodule import LaionDataModule

    settings = {"image_size": 8, "batch_size": 4, "window": 2}
    local = batches(LaionDataModule(str(tmp_path / "web"), **settings), 12)
    size = (tmp_path / "web" / "train-00.tar").stat().st_size
    remote = LaionDataModule(
        f"{server.address}/train-{{00..05}}.tar",
        num_workers=num_workers,
        cache=str(tmp_path / "cache"),
        cache_gb=4 * size / 1e9,
        verify="sha256",
        **settings,
    )
    assert batches(remote, 12) == local
    assert sum(file.stat().st_size for file in (tmp_path / "cache" / "shards").glob("*.tar")) <= 4 * size


def test_what_a_loader_process_cannot_fetch_ends_the_run_with_one_line(server, tmp_path, capsys, monkeypatch):
    from imagen_lightning.cli import main as cli
    from imagen_lightning.data.datamodule import LaionDataModule

    for number in range(NUM_SHARDS):
        open_index(str(tmp_path / "web" / f"train-{number:02d}.tar"), hashes=True)
        server.mischief[f"train-{number:02d}.tar"] = [403] * 9
    address, folder = f"{server.address}/train-{{00..05}}.tar", str(tmp_path / "cache")
    data = LaionDataModule(address, image_size=8, batch_size=4, cache=folder, num_workers=1)
    batches = iter(data.train_dataloader())
    monkeypatch.setattr(cli, "_run", lambda _: next(batches))
    assert cli.main([]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"imagen-lightning: error: shard '{server.address}/train-0")
    assert "cannot be read: 403" in line
    assert line.count("\n") == 1
    batches._shutdown_workers()  # while their server is there


def test_each_shard_is_fetched_once_an_epoch_and_before_it_is_needed(server, tmp_path):
    from imagen_lightning.data.datamodule import LaionDataModule

    for number in range(NUM_SHARDS):
        open_index(str(tmp_path / "web" / f"train-{number:02d}.tar"), hashes=True)
    size = (tmp_path / "web" / "train-00.tar").stat().st_size
    data = LaionDataModule(
        f"{server.address}/train-{{00..05}}.tar",
        image_size=8,
        batch_size=1,
        window=1,
        cache=str(tmp_path / "cache"),
        cache_gb=2.5 * size / 1e9,
    )
    dataset = data.training_set()
    order = [dataset.order.at(NUM_SAMPLES * number)[0] for number in range(NUM_SHARDS)]
    cache = dataset.shards.cache
    for position in range(NUM_SAMPLES * NUM_SHARDS):
        dataset[position]
        following = order[position // NUM_SAMPLES + 1 :][:1]
        if position % NUM_SAMPLES == 1:  # the next window's shard comes while this one is read
            wait_for(lambda: all(cache.path(dataset.shards.indexes[shard].shard).exists() for shard in following))  # noqa: B023
    fetched = [name for name in server.bodies() if name.endswith(".tar")]
    assert sorted(fetched[:NUM_SHARDS]) == sorted(f"train-{shard:02d}.tar" for shard in order)  # each once


def test_validation_reads_remote_shards(server, tmp_path):
    from imagen_lightning.data.datamodule import LaionDataModule

    address = f"{server.address}/train-{{00..05}}.tar"
    data = LaionDataModule(address, address, image_size=8, batch_size=8, cache=str(tmp_path / "cache"), num_val=9)
    found = [caption for batch in data.val_dataloader() for caption in batch.captions]
    assert found == [EXPECTED[number * 24 // 9] for number in range(9)]


def test_filters_read_the_parquet_beside_a_remote_shard(server, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    from imagen_lightning.data.datamodule import LaionDataModule

    for shard in range(NUM_SHARDS - 1):
        keys = [f"{number:04d}" for number in range(shard * NUM_SAMPLES, (shard + 1) * NUM_SAMPLES)]
        table = pyarrow.table({"key": keys, "punsafe": [0.1, 0.9, 0.1, 0.9]})
        parquet.write_table(table, tmp_path / "web" / f"train-{shard:02d}.parquet")
    data = LaionDataModule(
        f"{server.address}/train-{{00..05}}.tar",
        image_size=8,
        batch_size=4,
        cache=str(tmp_path / "cache"),
        filter={"punsafe_max": 0.5},
    )
    data.training_set()
    assert data.filter_counts["train"].left == 2 * (NUM_SHARDS - 1)
    assert index_shard(tmp_path / "web" / "train-00.tar").num_samples == NUM_SAMPLES
