"""Models on the hub, as huggingface_hub itself brings them from a fake one: rows F34 to F36 of the list of faults."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from sd_jax.images import read_metadata
from sd_jax.types import RequestError, WeightsError
from sd_jax.weights import hub
from sd_jax.weights.convert import write_diffusers
from tests import micro
from tests.fake_hub import FakeHub, Repository, read

ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "Secret" * 6
VAE = "vae/diffusion_pytorch_model.safetensors"
NEEDED = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    VAE,
]
NOT_NEEDED = [
    ".gitattributes",
    "README.md",
    "feature_extractor/preprocessor_config.json",
    "grid.png",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "v1-4-pruned.ckpt",
    "v1-4-pruned.safetensors",
    "vae/diffusion_flax_model.msgpack",
    "vae/diffusion_pytorch_model.bin",
]

# ---- a hub, and processes that use it ------------------------------------------------------------------------------


@dataclasses.dataclass
class Done:
    """What a user sees of a command."""

    status: int
    out: str
    err: str
    seconds: float

    def refused(self, *expected: str) -> None:
        """One line that says so, and nothing else."""
        assert (self.status, self.out) == (2, ""), self
        assert self.err.startswith("error: ") and self.err.count("\n") == 1, self.err
        assert all(part in self.err for part in expected), self.err
        self.silent_about_the_token()

    def printed(self, *lines: object) -> None:
        """All went well, without a word on the way but for the commit."""
        said = re.sub(r"\Aowner/\S+ at [0-9a-f]{40}\n", "", self.err)
        assert (self.status, self.out, said) == (0, "".join(f"{line}\n" for line in lines), ""), self

    def silent_about_the_token(self) -> None:
        assert "Secret" not in self.out + self.err


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """A repository like that of v1-4, with a model that is small."""
    folder = tmp_path_factory.mktemp("written") / "model"
    write_diffusers(folder, micro.MICRO, micro.params(), micro.TOKENIZER)
    written = read(folder)
    return {path: written[path] for path in NEEDED} | {path: path.encode() for path in NOT_NEEDED}


@pytest.fixture(scope="module")
def server():
    with FakeHub() as server:
        yield server


@pytest.fixture
def repository(request, server, files):
    """(its name, itself): one for each test, as the cache is the same for all."""
    name = f"owner/{re.sub(r'[^a-z]+', '-', request.node.name)[:60].strip('-')}"
    repository = server.repositories[name] = Repository()
    repository.push(files)
    server.requests.clear()
    yield name, repository
    server.down = None
    for kept in (server.altered, server.broken, server.members, server.revoked):
        kept.clear()


@pytest.fixture(scope="module")
def environment(server, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("home")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    where = {"HF_ENDPOINT": server.url, "HF_HOME": f"{folder}/huggingface", "XDG_CACHE_HOME": f"{folder}/cache"}
    plain = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", "no_proxy": "*"}
    return kept | where | plain | {"HF_TOKEN": TOKEN}


def command(environment, *argv: object, **changes: str) -> Done:
    """``sd-jax`` in a process of its own."""
    began = time.monotonic()
    line = [sys.executable, "-m", "sd_jax", *map(str, argv)]
    done = subprocess.run(line, cwd=ROOT, env=environment | changes, capture_output=True, text=True, timeout=120)
    return Done(done.returncode, done.stdout, done.stderr, time.monotonic() - began)


class Worker:
    """A process that runs one thing after the other: what starting takes is paid for once."""

    CODE = """
import json, os, sys, tempfile, time, traceback
from sd_jax.cli import main
from sd_jax.types import RequestError
from sd_jax.weights import hub
from sd_jax.weights.source import open_source

answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    code, token = json.loads(line)
    os.environ["HF_TOKEN"] = token
    said = [tempfile.TemporaryFile() for _ in range(2)]
    for number, file in enumerate(said, 1):
        os.dup2(file.fileno(), number)  # the library's log keeps the stderr that it found first
    began, status = time.monotonic(), 0
    try:
        exec(code)
    except SystemExit as exit:
        status = exit.code
    except RequestError as error:
        status = 2
        print(f"error: {error}", file=sys.stderr)
    except BaseException:
        status = 1
        traceback.print_exc()
    seconds = time.monotonic() - began
    sys.stdout.flush(), sys.stderr.flush()
    for file in said:
        file.seek(0)
    print(json.dumps([status, *(file.read().decode() for file in said), seconds]), file=answers, flush=True)
"""

    def __init__(self, environment: dict[str, str]):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", self.CODE], env=environment, cwd=ROOT, **pipes)

    def run(self, code: str, token: str = TOKEN) -> Done:
        """Python, with ``hub`` and ``open_source`` at hand."""
        print(json.dumps([code, token]), file=self.process.stdin, flush=True)
        return Done(*json.loads(self.process.stdout.readline()))

    def command(self, *argv: object, token: str = TOKEN) -> Done:
        return self.run(f"sys.exit(main({list(map(str, argv))!r}))", token)

    def revision(self, name: str, revision: str | None = None) -> Done:
        """Print the commit that a model is of."""
        return self.run(f"print(open_source({name!r}, revision={revision!r}).report.revision)")


@pytest.fixture(scope="module")
def worker(environment):
    worker = Worker(environment)
    yield worker
    worker.process.stdin.close()
    worker.process.wait(30)


@pytest.fixture(scope="module")
def nobody():
    """An address where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


# ---- what is fetched, and recorded ---------------------------------------------------------------------------------


def test_a_first_picture(repository, server, environment, tmp_path):
    name, held = repository
    argv = ["txt2img", "a", "--model", name, "--steps", "1", "--out", tmp_path / "out"]
    done = command(environment, *argv)
    picture = tmp_path / "out" / "00000-0.png"
    assert (done.status, done.out) == (0, f"{picture}\n"), done
    assert [line.split(" ")[0] for line in done.err.splitlines()] == [name, "seed"], "no bar where there is no terminal"
    assert server.files() == NEEDED
    assert read_metadata(picture)["revision"] == held.branches["main"]

    assert {request.token for request in server.requests if request.storage} == {None}, "the token is for the hub"
    assert TOKEN in {request.token for request in server.requests}
    for request in server.requests:
        others = {key: value for key, value in request.headers.items() if key != "authorization"}
        assert TOKEN not in f"{request.path} {others}"
    done.silent_about_the_token()


def test_a_branch_and_a_commit(repository, server, files, worker):
    name, held = repository
    commits = [held.branches["main"], held.push(files, "a/b")]
    worker.revision(name, "a/b").printed(commits[1])
    assert server.files() == NEEDED
    worker.revision(name, commits[0]).printed(commits[0])
    worker.revision(name).printed(commits[0])
    server.requests.clear()
    worker.revision(name, commits[0]).printed(commits[0])
    assert not server.requests, "what a commit holds does not change"
    worker.revision(name).printed(commits[0])
    assert len(server.requests) == 2, "whether it answers, and which commit it is"


def test_another_name_of_the_weights_is_looked_for_in_silence(repository, server, files, worker):
    name, held = repository
    half = VAE.replace(".safetensors", ".fp16.safetensors")
    held.push({path: raw for path, raw in files.items() if not path.startswith("vae/diffusion_")} | {half: files[VAE]})
    worker.revision(name).printed(held.branches["main"])
    assert server.files() == sorted({*NEEDED, half} - {VAE})


def test_one_file(repository, server, worker):
    name, held = repository
    code = f"p = hub.fetch_file({name!r}, {VAE!r}); print(hub.commit(p), *p.parts[-2:], p.stat().st_size)"
    size = len(held.commits[held.branches["main"]][VAE])
    worker.run(code).printed(f"{held.branches['main']} {VAE.replace('/', ' ')} {size}")
    assert server.files() == [VAE]
    worker.run(f"hub.fetch_file({name!r}, 'vae/x.ckpt')").refused(
        f"{server.url}/{name} has no file vae/x.ckpt; see {server.url}/{name}/tree/main"
    )
    worker.run(f"hub.fetch_file({name!r}, {VAE!r}, 'v9')").refused("has no revision 'v9'")
    held.gated = True
    worker.run(f"hub.fetch_file({name!r}, 'README.md')").refused(f"{server.url}/{name} is gated: accept its licence")


def test_one_network(repository, server, worker, files):
    """From the folder of a whole model, from the top of its own repository, and as one file; nothing else comes."""
    name, file = repository[0], os.path.basename(VAE)
    alone = server.repositories[f"{name}-vae"] = Repository()
    alone.push({"config.json": files["vae/config.json"], file: files[VAE], "README.md": b"no"})
    start = "from sd_jax.weights.source import open_source; from tests.micro import micro_file; "
    for where, wanted in {
        name: {"vae/config.json", VAE},
        f"{name}-vae": {"config.json", file},
        f"hf://{name}-vae/{file}": {file},
    }.items():
        server.requests.clear()
        code = f"s = open_source(micro_file(), parts={{'vae': {where!r}}}); print(*s.report.parts[0])"
        commit = (alone if "-vae" in where else repository[1]).branches["main"]
        worker.run(start + code).printed(f"vae {where} at {commit}")
        assert set(server.files()) <= wanted
    worker.run(start + "open_source(micro_file(), parts={'vae': 'owner/none'})").refused("owner/none does not exist")


def test_on_a_terminal_there_is_one_bar(repository, environment, tmp_path):
    name, _ = repository
    terminal, end = os.openpty()
    termios.tcsetwinsize(end, (24, 100))
    line = [sys.executable, "-m", "sd_jax", "convert", name, str(tmp_path / "a.safetensors")]
    with subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=end, text=True) as process:
        os.close(end)
        shown = b""
        with contextlib.suppress(OSError):  # which is how the other side says on Linux that it has ended
            while some := os.read(terminal, 4096):
                shown += some
        assert process.stdout.read() == f"{tmp_path / 'a.safetensors'}\n", "stdout is for the paths"
    os.close(terminal)
    shown = shown.decode()
    assert process.returncode == 0 and re.search(rf"\r{name}: .*0%.*/290k", shown), shown
    bars, _, last = shown.rpartition("\r" + name)
    assert "\n" not in bars and bars.endswith(" "), f"a bar is left: {shown!r}"
    assert re.fullmatch(r" at [0-9a-f]{40}\r\n", last)
    assert "Fetching" not in shown and "Reconstruct" not in shown and "Secret" not in shown


# ---- F34 ---------------------------------------------------------------------------------------------------------


def test_a_gated_repository(repository, server, worker, tmp_path):
    name, held = repository
    held.gated = True
    convert = ["convert", name, tmp_path / "a.safetensors"]
    for token in (TOKEN, ""):
        said = f"{server.url}/{name} is gated: accept its licence there with your account, then run `hf auth login`"
        worker.command(*convert, token=token).refused(said)
    server.members.add(TOKEN)
    worker.command(*convert).printed(tmp_path / "a.safetensors")


@pytest.mark.parametrize("token", [TOKEN, ""])
def test_a_repository_that_is_missing_or_private(repository, server, worker, token, tmp_path):
    name, held = repository
    held.private = True
    for missing in (name, "owner/missing"):
        worker.command("convert", missing, tmp_path / "a", token=token).refused(
            f"{server.url}/{missing} does not exist, or not for you; check the name, or run `hf auth login`"
        )


@pytest.mark.parametrize("revision", ["v9", "0" * 40, "a b/../c"])
def test_a_missing_revision(repository, server, worker, revision, tmp_path):
    name, _ = repository
    worker.command("convert", name, tmp_path / "a", "--revision", revision).refused(
        f"{name} has no revision '{revision}'; see {server.url}/{name}/commits/main"
    )


def test_a_token_that_is_no_longer_good(repository, server, worker, tmp_path):
    name, _ = repository
    server.revoked.add(TOKEN)
    worker.command("convert", name, tmp_path / "a").refused("refuses your token", "run `hf auth login`")


def test_a_token_that_cannot_be_sent(repository, worker, tmp_path):
    name, _ = repository
    worker.command("convert", name, tmp_path / "a", token=f"{TOKEN}\u2019").refused("cannot be fetched: 'ascii' codec")


@pytest.mark.parametrize(
    "said, kept",
    [
        ("Illegal header value b'Bearer hf_abc\\x01' here", "Illegal header value b'Bearer ...' here"),
        ("for url 'https://me:hf_abc@mirror.example/a/b?c=d&e=hf_abc'", "for url 'https://...@mirror.example/a/b...'"),
        ("is it there? It is not", "is it there? It is not"),
    ],
)
def test_what_a_library_says_is_told_without_secrets(said, kept):
    assert hub._reason(ValueError(f"\n{said}\nmore")) == kept
    assert hub._reason(ValueError()) == "ValueError"


# ---- F35 ---------------------------------------------------------------------------------------------------------


def test_no_network(repository, environment, worker, nobody, tmp_path):
    """What is in the cache needs none, told of it or not; what is not fails at once."""
    name, held = repository
    commit = held.branches["main"]
    worker.revision(name).printed(commit)
    dead = {"HF_ENDPOINT": nobody}
    for changes, argv in ((dead, []), (dead | {"HF_HUB_OFFLINE": "1"}, ["--revision", commit])):
        path = tmp_path / f"{len(argv)}.safetensors"
        command(environment, "convert", name, path, *argv, **changes).printed(path)

    offline = Worker(environment | dead)
    for source in ("owner/other", name):
        revision = "1" * 40 if source == name else None  # of which the library would try to list the files six times
        done = offline.revision(source, revision)
        done.refused(f"{nobody}/{source}", "cannot be reached ([Errno 111] Connection refused)", "not in the cache")
        done.refused("unet/config.json", f"hf download {source}")
        assert done.seconds < 5
    done = offline.run(f"hub.fetch_file({name!r}, 'v1-4-pruned.ckpt')")
    done.refused("cannot be reached", "(v1-4-pruned.ckpt)", f"`hf download {name} v1-4-pruned.ckpt`")
    assert done.seconds < 5
    offline.process.stdin.close()
    offline.process.wait(30)


def test_a_download_that_stopped_and_no_network(repository, environment, worker, nobody, tmp_path):
    """Its configs are in the cache, and its weights are not."""
    name, _ = repository
    worker.run(f"hub.fetch({name!r}, ['*.json', '*.txt'])").printed()
    done = command(environment, "convert", name, tmp_path / "a", HF_ENDPOINT=nobody)
    done.refused("cannot be reached", "(text_encoder/model.safetensors)")
    done = command(environment, "convert", name, tmp_path / "a", HF_HUB_OFFLINE="1")
    done.refused("cannot be reached (HF_HUB_OFFLINE is set)", "(text_encoder/model.safetensors)")


def test_a_hub_that_never_answers(environment, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        changes = {"HF_ENDPOINT": f"http://127.0.0.1:{mute.getsockname()[1]}", "HF_HUB_ETAG_TIMEOUT": "1"}
        done = command(environment, "convert", "owner/mute", tmp_path / "a", **changes)
    done.refused("cannot be reached (timed out)")
    assert done.seconds < 20


def test_a_hub_that_is_down(repository, server, worker):
    name, held = repository
    server.down = 503
    worker.revision(name).refused(f"{server.url}/{name} cannot be reached", "503")
    server.down = None
    worker.revision(name).printed(held.branches["main"])
    server.down = 503
    worker.revision(name).printed(held.branches["main"])


# ---- F36 ---------------------------------------------------------------------------------------------------------


def test_a_branch_that_moves(repository, server, files, worker, environment, nobody, tmp_path):
    name, held = repository
    old = held.branches["main"]
    worker.revision(name).printed(old)
    config = json.loads(files["scheduler/scheduler_config.json"]) | {"num_train_timesteps": 900}
    new = held.push(files | {"scheduler/scheduler_config.json": json.dumps(config).encode()})
    server.requests.clear()
    argv = ["txt2img", "a", "--model", name, "--steps", "1", "--out", tmp_path]
    assert worker.command(*argv).out == f"{tmp_path / '00000-0.png'}\n"
    assert read_metadata(tmp_path / "00000-0.png")["revision"] == new != old
    fetched = [request.path.split("/", 5)[-1] for request in server.requests if request.method == "GET"]
    assert "scheduler/scheduler_config.json" in fetched and VAE not in fetched, "what is the same is not fetched again"

    with_old = command(environment, *argv, "--revision", old, HF_ENDPOINT=nobody)
    assert with_old.out == f"{tmp_path / '00001-0.png'}\n", with_old
    assert read_metadata(tmp_path / "00001-0.png")["revision"] == old
    worker.revision(name).printed(new)


@pytest.mark.parametrize("damage", ["last bit", "first bit", "cut"])
def test_a_file_that_changed_on_disk(repository, worker, tmp_path, damage):
    """Whatever is wrong with it, the sentence says what to do: the library does not look at what it has."""
    name, _ = repository
    worker.command("convert", name, tmp_path / "a.safetensors").printed(tmp_path / "a.safetensors")
    blob = (Path(worker.run(f"print(hub.fetch({name!r}, ['vae/*.safetensors']))").out.strip()) / VAE).resolve()
    raw = bytearray(blob.read_bytes())
    if damage == "cut":
        del raw[-100:]
    else:
        raw[-1 if damage == "last bit" else 0] ^= 1
    blob.write_bytes(raw)
    done = worker.command("convert", name, tmp_path / "b.safetensors")
    done.refused(VAE, "does not match the SHA-256 of the hub", f"delete {blob} and fetch it again")
    assert not (tmp_path / "b.safetensors").exists()
    blob.unlink()
    worker.command("convert", name, tmp_path / "b.safetensors").printed(tmp_path / "b.safetensors")


def test_a_file_that_is_not_what_the_hub_says(repository, server, worker):
    name, _ = repository
    server.altered.add(VAE)
    worker.revision(name).refused(VAE, "does not match the SHA-256 of the hub")


@pytest.mark.parametrize("how", ["reset", "cut"])
def test_a_line_that_breaks(repository, server, worker, how):
    name, held = repository
    commit = held.branches["main"]
    server.broken[VAE] = 1, how
    done = worker.revision(name)
    if how == "reset":
        done.refused(f"{server.url}/{name}/tree/{commit} cannot be fetched", "reset by peer; try again")
        worker.revision(name).printed(commit)
    else:  # the library asks again itself, and says so
        assert (done.status, done.out) == (0, f"{commit}\n") and "Trying to resume download" in done.err, done
        done.silent_about_the_token()
    assert [VAE in request.path for request in server.requests if request.storage].count(True) == 2


def test_hashes(tmp_path):
    """A blob is named by its hash; with Xet it may itself be a link, into a store that has other names."""
    repository = tmp_path / "models--owner--name"
    links = []
    for i, raw in enumerate((b"a" * 3000, b"b" * 3000, b"c" * 3000)):
        blob = repository / "blobs" / hashlib.sha256(raw).hexdigest()
        link = repository / "snapshots" / ("0" * 40) / "unet" / f"{i}.bin"
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(raw)
        link.symlink_to(os.path.relpath(blob, link.parent))
        links.append(link)
    stored = tmp_path / "blobs" / "01" / ("01" * 32)
    stored.parent.mkdir(parents=True)
    blob = links[1].resolve()
    shutil.move(blob, stored)
    blob.symlink_to(os.path.relpath(stored, blob.parent))
    (tmp_path / "mine.bin").symlink_to(links[1])
    (tmp_path / "plain.bin").write_bytes(b"plain")
    hub.verify([*links, tmp_path / "mine.bin", tmp_path / "plain.bin"])
    hub.verify([])

    for path in (stored, links[2]):
        path.write_bytes(path.read_bytes()[:-1] + b"d")
    for files, first, blob in ((links, links[1], stored), (links[::-1], links[2], links[2].resolve())):
        with pytest.raises(WeightsError) as caught:
            hub.verify(files)
        assert str(caught.value).startswith(f"{first} does not match") and f"delete {blob} and" in str(caught.value)


# ---- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, expected",
    {
        "CompVis/stable-diffusion-v1-4": ("CompVis/stable-diffusion-v1-4", None),
        "hf://CompVis/stable-diffusion-v1-4": ("CompVis/stable-diffusion-v1-4", None),
        "hf://a/b/c.ckpt": ("a/b", "c.ckpt"),
        "hf://a/b/c/my model.safetensors": ("a/b", "c/my model.safetensors"),
        "hf://a/b.ckpt": ("a/b.ckpt", None),
        "models/sd.ckpt": None,
        "models/sd.SafeTensors": None,
        "a/b/c": None,
        "tiny": None,
        "": None,
        "/a/b": None,
        "./a/b": None,
        "hf://": None,
        "hf://a": None,
        "hf:/a/b": None,
        "HF://a/b": None,
        "hf://a/b/": None,
        "hf://a/b//c": None,
        "hf://a/b/../c": None,
        "hf://a/b/c\n": None,
        "hf://a/b/c\0": None,
        "hf://hf://a/b": None,
        "https://huggingface.co/a/b": None,
    }.items(),
)
def test_names(source, expected):
    assert hub.parse(source) == expected


def test_commits():
    commit = "133a221b8aa7292a167afc5127cb63fb5005638b"
    folder = Path("/home/a/hub/models--a--b/snapshots") / commit
    assert hub.commit(folder) == hub.commit(folder / "x.ckpt") == hub.commit(folder / "a" / "b" / "x.ckpt") == commit
    for path in (folder.parent, Path("/a") / commit, Path("snapshots/main/x.ckpt"), Path()):
        assert hub.commit(path) is None


def test_what_is_no_repository_is_not_asked_for():
    for name in ("a", "a/b/c", "hf://a/b"):
        with pytest.raises(RequestError, match=f"'{name}' is not a hub id; it has the form owner/name"):
            hub.fetch_file(name, "x.ckpt")
