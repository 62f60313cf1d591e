"""The published wheel: exactly the client, beside other people's packages of any name, doing nothing on import."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
CONSTRAINTS = CHECKOUT / "config" / "constraints.txt"
DECOYS = ("config", "schemas", "workers")

pytestmark = pytest.mark.timeout(300)


def pip(*words: str | Path) -> None:
    argv = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, words)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr


def run(python: Path, program: str, folder: Path, *words: str) -> Any:
    """Run a program with an environment that has nothing of the checkout; the JSON that it prints."""
    script = folder / "program.py"
    script.write_text(program, encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "AGENTQ_"))}
    done = subprocess.run(
        [str(python), "-W", "error::ResourceWarning", str(script), *words], cwd=folder, env=env, capture_output=True,
        text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as it would be published, built in an environment of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", CHECKOUT, "--no-deps", "--wheel-dir", folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def customer(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of somebody who has packages with our generic names and installs the client from its wheel."""
    folder = tmp_path_factory.mktemp("customer")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True, timeout=100)
    python = folder / "venv" / "bin" / "python"
    install = ("--python", python, "install", "--no-compile")
    pip(*install, "--no-deps", *(decoy(name, folder) for name in DECOYS))
    pip(*install, "--constraint", CONSTRAINTS, wheel)
    return python


def decoy(name: str, folder: Path) -> Path:
    """Somebody else's wheel with one package of that name."""
    info = f"{name}_of_somebody-1.0.dist-info"
    files = {
        f"{name}/__init__.py": f"WHOSE = 'the customer: {name}'\n",
        f"{name}/settings.py": "COLOUR = 'blue'\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}-of-somebody\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},{_digest(text)},{len(text)}\n" for path, text in files.items())
    path = folder / f"{name}_of_somebody-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(file, text)
    return path


def _digest(text: str) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


def test_the_wheel_holds_the_client_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = next(name.split("/")[0] for name in names if name.endswith("/METADATA"))
    assert sorted(names) == sorted(
        [
            "agentq/__init__.py", "agentq/client.py", "agentq/handle.py", "agentq/connection.py", "agentq/gate.py",
            "agentq/turns.py", "agentq/schedule.py", "agentq/run.py", "agentq/event.py", "agentq/protocol.py",
            "agentq/canonical.py", "agentq/errors.py", "agentq/py.typed",
            f"{info}/METADATA", f"{info}/WHEEL", f"{info}/RECORD",
        ]
    )  # fmt: skip


def test_it_is_installed_beside_packages_of_our_generic_names(customer: Path, tmp_path: Path) -> None:
    """The customer's ``config``, ``schemas`` and ``workers`` are theirs before, beside and after agentq."""
    program = f"""
import importlib, json
import agentq.client
from importlib.metadata import distribution
names = {DECOYS!r}
whose = [importlib.import_module(name).WHOSE for name in names]
colours = [importlib.import_module(name + ".settings").COLOUR for name in names]
whole = all(file.locate().stat().st_size == file.size for name in names
            for file in distribution(name + "-of-somebody").files if file.size is not None)
print(json.dumps([whose, colours, whole, agentq.client.__file__]))
"""
    whose, colours, whole, place = run(customer, program, tmp_path)
    assert whose == [f"the customer: {name}" for name in DECOYS]
    assert colours == ["blue"] * len(DECOYS)
    assert whole
    assert Path(place).is_relative_to(customer.parents[1]), "the client under test must come from the wheel"


def test_importing_the_client_does_nothing_to_its_host(customer: Path, tmp_path: Path) -> None:
    """It reads no environment variable, configures no logging, and does not become the current Celery application."""
    program = """
import json, logging, os, sys
import celery

host = celery.Celery("host")
root = logging.getLogger()
before = [list(root.handlers), root.level, sorted(logging.root.manager.loggerDict)]
read = []

class Recording(type(os.environ)):
    def __init__(self, real):
        self.__dict__.update(real.__dict__)
    def __getitem__(self, name):
        frame = sys._getframe(1)
        while frame and frame.f_code.co_filename.endswith(("os.py", "_collections_abc.py", "<frozen os>",
                                                            "<frozen _collections_abc>")):
            frame = frame.f_back
        read.append([str(name), frame.f_code.co_filename])
        return super().__getitem__(name)

os.environ = Recording(os.environ)
os.environ.get("CANARY")
import agentq.client
client = agentq.client.Client("mongodb://127.0.0.1:1", "redis://127.0.0.1:1")
agentq.connection._celery("redis://127.0.0.1:1")
ours = [name for name, file in read if "/agentq/" in file]
after = [list(root.handlers), root.level]
print(json.dumps({
    "recorder_works": ["CANARY", __file__] in read,
    "ours": ours,
    "logging_untouched": before[:2] == after,
    "our_handlers": [str(one.handlers) for name, one in logging.root.manager.loggerDict.items()
                     if name.startswith("agentq") and getattr(one, "handlers", None)],
    "current": celery.current_app.main,
    "loaded": [name for name in sys.modules if name.split(".")[0] in ("config", "schemas", "workers")],
}))
"""
    assert run(customer, program, tmp_path) == {
        "recorder_works": True,
        "ours": [],
        "logging_untouched": True,
        "our_handlers": [],
        "current": "host",
        "loaded": [],
    }


def test_a_client_works_in_its_process_and_in_forked_children(customer: Path, tmp_path: Path, mongo_url: str) -> None:
    """Used before the fork, in a child, in a grandchild, and afterwards in the parent again; nobody else's Celery
    application is replaced by it."""
    program = """
import json, os, sys, traceback
import celery
from pymongo import MongoClient
from agentq.client import Client
from agentq.errors import NotFound

url, database = sys.argv[1:]
with MongoClient(url) as mongo:
    mongo[database]["workflow_names"].insert_one({
        "_id": "default", "name": "default", "hash": "h", "start_pool": "router", "start_recovery": "retry",
        "max_wall_s": 60.0,
    })
host = celery.Celery("host")
client = Client(url, None, database)

def in_child(work):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, json.dumps(work()).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    with open(reader) as stream:
        found = stream.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child ended with {status}"
    return json.loads(found)

def submit(name):
    run = client.submit(name)
    assert client.run(run.run_id).status() == "queued"
    return run.run_id

first = submit("parent")
child = in_child(lambda: [submit("child"), in_child(lambda: submit("grandchild"))])
again = submit("parent again")
runs = [first, *child, again]
inputs = []
with MongoClient(url) as mongo:
    inputs = [mongo[database]["runs"].find_one({"_id": run})["input"] for run in runs]
client.close()
print(json.dumps({"inputs": inputs, "current": celery.current_app.main}))
"""
    found = run(customer, program, tmp_path, mongo_url, f"fork_{tmp_path.name[-20:]}")
    assert found == {"inputs": ["parent", "child", "grandchild", "parent again"], "current": "host"}
