"""What the device half imports, and what it does behind one's back: nothing."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

CLOUD = (
    "torch", "torchvision", "transformers", "peft", "accelerate", "onnx", "onnxscript",
    "safetensors", "pydantic", "rich", "matplotlib", "pyarrow", "sklearn", "scipy", "tomli_w",
)  # fmt: skip
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)

sys.meta_path.insert(0, Block())
"""
IDLE_S = 4.0


def run_blocked(python, blocked, code):
    done = python("-c", BLOCK.format(blocked=set(blocked)) + code)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def test_both_tasks_predict_where_nothing_of_the_cloud_side_is_installed(
    python, color_bundle, word_bundle
):
    code = f"""
import json
import numpy as np
from PIL import Image
import edgetune.runtime
from edgetune.runtime import EdgeModel

colors = EdgeModel.load({str(color_bundle)!r}, check="full")
words = EdgeModel.load({str(word_bundle)!r}, check="full")
colors.self_test(), words.self_test()
answers = [colors.predict(Image.new("RGB", (3, 3), (0, 0, 99))).label, words.predict("good").label]
print(json.dumps([answers, sorted({set(CLOUD)!r} & {{m.partition(".")[0] for m in sys.modules}})]))
"""
    assert run_blocked(python, CLOUD, code) == [["blue", "positive"], []]


@pytest.mark.parametrize("blocked", ["torch", "onnx"])
def test_the_blocker_blocks(python, blocked):
    done = python("-c", BLOCK.format(blocked={blocked}) + f"import {blocked}")
    assert done.returncode == 1
    assert f"No module named '{blocked}' (blocked)" in done.stderr.decode()


HEAVY = ("torch", "onnxruntime", "numpy", "PIL", "tokenizers", "onnx", "transformers")


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import edgetune", HEAVY),
        ("import edgetune.errors, edgetune.runtime, edgetune.runtime.manifest", HEAVY),
        ("from edgetune.cli.main import cli; cli.main(['--help'], standalone_mode=False)", HEAVY),
        ("from edgetune.runtime.cli.main import cli; cli.main(['--help'], standalone_mode=False)",
         HEAVY),
        ("from edgetune.runtime.cli.main import cli;"
         " cli.main(['info', BUNDLE], standalone_mode=False)",
         HEAVY),
        ("from edgetune.runtime import EdgeModel; EdgeModel.load(BUNDLE)", ("torch", "PIL")),
    ],
)  # fmt: skip
def test_it_imports_nothing_heavy_that_it_does_not_need(python, color_bundle, code, heavy):
    code = f"BUNDLE = {str(color_bundle)!r}\n{code}\n"
    code += f"import sys\nprint('\\n' + str([m for m in {heavy!r} if m in sys.modules]))"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().splitlines()[-1] == "[]"


def test_without_pillow_arrays_predict_and_files_name_the_extra(python, color_bundle):
    code = f"""
import json
import numpy as np
from edgetune.errors import MissingExtraError
from edgetune.runtime import EdgeModel

model = EdgeModel.load({str(color_bundle)!r}, check="full")
label = model.predict(np.full((2, 2, 3), (0, 9, 0), np.uint8)).label
model.self_test()
try:
    model.predict("photo.jpg")
except MissingExtraError as error:
    print(json.dumps([label, str(error), error.extra, error.exit_code]))
"""
    message = "pillow is not installed; it comes with: pip install 'edgetune[image]'"
    assert run_blocked(python, ["PIL"], code) == ["green", message, "image", 2]


def test_without_tokenizers_a_text_bundle_names_the_extra(python, word_bundle):
    code = f"""
import json
from edgetune.errors import MissingExtraError
from edgetune.runtime import EdgeModel

try:
    EdgeModel.load({str(word_bundle)!r})
except MissingExtraError as error:
    print(json.dumps([str(error), error.extra, error.exit_code]))
"""
    message = "tokenizers is not installed; it comes with: pip install 'edgetune[text]'"
    assert run_blocked(python, ["tokenizers"], code) == [message, "text", 2]


# -- telemetry ----------------------------------------------------------------------------------

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def predicting(color_bundle, word_bundle):
    return f"""
import numpy as np
from edgetune.runtime import EdgeModel

EdgeModel.load({str(color_bundle)!r}, check="full").self_test()
EdgeModel.load({str(word_bundle)!r}, check="full").self_test()
"""


def fresh_home(folder):
    """Return an environment whose home and cache are new and in which nobody opted out."""
    (folder / "home" / "cache").mkdir(parents=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ORT_", "XDG_"))}
    home = str(folder / "home")
    return environment | {"HOME": home, "XDG_CACHE_HOME": f"{home}/cache", "TMPDIR": home}


def watch(code, folder, *, until_seen=False):
    """Run `code`, let it idle and return (files it made, sockets it had open); it is killed.

    `until_seen` ends the watch with the first file, so that nothing is sent by the control.
    """
    environment = fresh_home(folder)
    files, sockets = set(), set()
    process = subprocess.Popen(
        [sys.executable, "-c", code + "\nimport time; print('ready', flush=True); time.sleep(60)"],
        env=environment,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert process.stdout.readline() == b"ready\n"
        end = time.monotonic() + IDLE_S
        while time.monotonic() < end and not (until_seen and files):
            sockets |= open_sockets(process.pid)
            files |= {p.name for p in (folder / "home").rglob("*") if p.is_file()}
            time.sleep(0.02)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    return files, sockets


def open_sockets(pid):
    found = set()
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(handle.readlink())
        except OSError:  # closed meanwhile
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


@linux
def test_the_watch_sees_a_file_and_a_socket(tmp_path):
    code = "import socket, pathlib; s = socket.socket(); (pathlib.Path.home() / 'x').touch()"
    files, sockets = watch(code, tmp_path, until_seen=True)
    assert files == {"x"}
    assert len(sockets) == 1


@linux
def test_a_device_that_predicts_and_idles_makes_no_file_and_opens_no_socket(
    color_bundle, word_bundle, tmp_path
):
    """The control: onnxruntime alone, its telemetry as it comes."""
    (tmp_path / "control").mkdir()
    seen = watch("import onnxruntime", tmp_path / "control", until_seen=True)
    files, sockets = watch(predicting(color_bundle, word_bundle), tmp_path)
    assert (files, sockets) == (set(), set())
    if seen == (set(), set()):
        pytest.skip("the installed onnxruntime leaves no trace of its own: nothing to switch off")


@linux
def test_a_device_that_predicts_makes_no_network_call_from_start_to_exit(
    color_bundle, word_bundle, tmp_path
):
    strace = shutil.which("strace")
    trace = tmp_path / "trace"
    command = [strace or "", "-f", "-e", "trace=network", "-o", str(trace)]
    if not strace or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("strace is not here or may not trace")
    environment = fresh_home(tmp_path)
    for code, calls in (
        ("import socket; socket.socket().close()", True),
        (predicting(color_bundle, word_bundle) + "\nimport time; time.sleep(1)", False),
    ):
        subprocess.run(
            [*command, sys.executable, "-c", code],
            check=True,
            env=environment,
            timeout=120,
            cwd=Path(__file__).parents[2],
        )
        assert ("socket(" in trace.read_text()) is calls
        assert ("connect(" in trace.read_text()) is False


def test_telemetry_is_off_even_where_the_environment_says_on(python):
    code = "import edgetune.runtime.ort, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = python("-c", code, env={"ORT_DISABLE_TELEMETRY": "0"})
    assert done.stdout == b"1\n"
