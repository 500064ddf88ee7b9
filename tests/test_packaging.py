"""What a user meets before the first tensor: names, import, the build, the command line."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fastnorm
from fastnorm import __main__ as command

ROOT = Path(__file__).parents[1]

NAMES = """
    BatchNorm1d BatchNorm2d BatchNorm3d BatchNormAct1d BatchNormAct2d BatchNormAct3d
    MeanOnlyBatchNorm1d MeanOnlyBatchNorm2d MeanOnlyBatchNorm3d LayerNorm GELU SiLU Swish SELU
    weight_norm weight_norm_ remove_weight_norm data_dependent_init_ replace_ fuse_ restore_
    SyncBatchNorm convert_sync_batchnorm
    backend set_backend backends compile_policy functional
""".split()
FUNCTIONS = """
    batch_norm sync_batch_norm mean_only_batch_norm layer_norm weight_norm
    gelu silu selu swish activation
""".split()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_the_public_names_are_these_and_no_others() -> None:
    assert sorted(fastnorm.__all__) == sorted(NAMES)
    assert sorted(fastnorm.functional.__all__) == sorted(FUNCTIONS)
    assert all(callable(getattr(fastnorm, name)) for name in NAMES if name != "functional")
    assert all(callable(getattr(fastnorm.functional, name)) for name in FUNCTIONS)


def test_import_touches_neither_triton_nor_a_gpu_nor_the_extension() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import fastnorm
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert "triton" not in new and "fastnorm._cuda" not in sys.modules, new
assert new == {"fastnorm"} or not new & {"numpy", "sklearn", "transformers", "torchvision"}, new
assert not torch.cuda.is_initialized()
print("blind")
"""
    done = run_python(code, TRITON_INTERPRET="0")
    assert done.stdout == "blind\n", done.stderr


def test_import_costs_under_50_ms_beyond_torch() -> None:
    code = """
import time, torch
start = time.perf_counter()
import fastnorm
print(1e3 * (time.perf_counter() - start))
"""
    # One of five is enough: others share the machine. The first writes the bytecode, as pip does.
    times = (float(run_python(code, PYTHONDONTWRITEBYTECODE="").stdout) for _ in range(5))
    assert any(milliseconds < 50 for milliseconds in times)


def test_types_are_shipped_and_the_version_has_one_home() -> None:
    assert (ROOT / "fastnorm" / "py.typed").exists()
    project = (ROOT / "pyproject.toml").read_text()
    assert 'version = { attr = "fastnorm.__version__" }' in project
    assert f"## {fastnorm.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_env_tells_each_backend_and_why_one_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["env"]) == 0
    told = capsys.readouterr().out
    for name, why in fastnorm.backends().items():
        assert f"backend {name}" in told
        assert (why or "available") in told
    assert fastnorm.__version__ in told


def test_an_unknown_backend_in_the_environment_is_an_error_that_lists_the_known() -> None:
    done = run_python("import fastnorm", FASTNORM_BACKEND="tritn")
    assert done.returncode != 0
    assert "unknown backend 'tritn'" in done.stderr
    assert "auto, reference, triton, cuda" in done.stderr


# the build


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, in a folder with one CUDA source and no nvcc in sight."""
    spec = importlib.util.spec_from_file_location("fastnorm_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "activation.cu").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(module.shutil, "which", lambda name, path=None: None)
    for name in ("FASTNORM_BUILD_CUDA", "CUDACXX", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return module


def test_auto_without_nvcc_builds_pure_python_and_says_so(
    build: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not build.wanted()
    assert "nvcc was not found" in capsys.readouterr().err


def test_asking_for_cuda_without_nvcc_fails_and_says_what_to_do(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTNORM_BUILD_CUDA", "1")
    with pytest.raises(
        SystemExit, match=r"nvcc was not found.*install the CUDA toolkit.*CUDA_HOME"
    ):
        build.wanted()


def test_asking_for_cuda_without_sources_fails(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "csrc" / "activation.cu").unlink()
    assert not build.wanted()
    monkeypatch.setenv("FASTNORM_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="no CUDA sources"):
        build.wanted()


def test_an_unknown_build_choice_fails(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTNORM_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="set it to auto, 1 or 0"):
        build.wanted()


def test_nvcc_is_looked_for_where_the_user_points(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def which(name: str, path: str | None = None) -> str | None:
        there = {("nvcc", None): "path", ("nvcc", "/there/bin"): "home", ("/my/nvcc", None): "mine"}
        return there.get((name, path))

    monkeypatch.setattr(build.shutil, "which", which)
    monkeypatch.setattr(build, "nvcc_version", lambda nvcc: build.OLDEST_NVCC)
    assert build.find_nvcc() == "path"
    monkeypatch.setenv("CUDA_HOME", "/there")
    assert build.find_nvcc() == "home"
    monkeypatch.setenv("CUDACXX", "/my/nvcc")
    assert build.find_nvcc() == "mine"
    assert build.wanted()
    monkeypatch.setenv("FASTNORM_BUILD_CUDA", "0")
    assert not build.wanted()


@pytest.mark.parametrize("told", ["release 11.8, V11.8.89", "release 13.0, V13.0.48"])
def test_an_nvcc_that_is_too_old_is_told_with_what_to_install(
    build: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    told: str,
) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name, path=None: "/usr/bin/nvcc")
    monkeypatch.setattr(build.subprocess, "check_output", lambda command, text: told)
    if "13.0" in told:
        assert build.wanted()
        return
    assert not build.wanted()
    why = r"/usr/bin/nvcc is of CUDA 11\.8.*need 12\.0 or newer: install a newer CUDA toolkit"
    assert re.search(why, capsys.readouterr().err)
    monkeypatch.setenv("FASTNORM_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match=f"FASTNORM_BUILD_CUDA=1, but {why}"):
        build.wanted()


def test_architectures_are_ours_that_nvcc_knows_or_the_users(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build.architecture_flags({"sm_80", "sm_90"}) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=sm_90",  # from the same PTX
        "-gencode=arch=compute_80,code=compute_80",  # for GPUs to come
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;9.0a+PTX")
    known = {"sm_86", "sm_90", "sm_90a", "lto_90"}
    assert build.architecture_flags(known) == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]


@pytest.mark.parametrize(
    "given, error",
    [
        ("Hopper", r"'Hopper' is not like 9\.0"),
        ("9.0;7.5", r"'7\.5' is below 8\.0, the oldest that the kernels run on"),
        ("9.0 14.0", r"this nvcc does not know '14\.0'; it knows sm_90, sm_90a"),
    ],
)
def test_an_architecture_that_cannot_be_built_is_an_error_that_lists_the_known(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, given: str, error: str
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    with pytest.raises(SystemExit, match=error):
        build.architecture_flags({"sm_90", "sm_90a", "lto_90"})
