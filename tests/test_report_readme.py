"""`python -m benchmarks report --readme`: README.md says what benchmarks/results/ holds."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.report import readme
from benchmarks.report.opening import MEMORY, SPEED
from benchmarks.report.readme import BEGIN, END, NO_GPU, OPENING
from benchmarks.schema import Environment, Results, ResultsError, Row, save
from benchmarks.shares import ACTIVATION, MOVES, NORM, REST, text
from tests import made_up

ROOT = Path(__file__).parents[1]
COUNTED = "| batch_norm | nchw | forward | 4 | 0.48 | 1.24x | 0.98x | 0.50x torch | 1 / 1 / 1 and 1"


def test_readme_agrees_with_the_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    _, inside, _ = readme.between_markers(text)
    assert inside == readme.readme_table(ROOT), "run: python -m benchmarks report --readme"
    _, opening, _ = readme.between_markers(text, *OPENING)
    assert opening == readme.readme_opening(ROOT), "run: python -m benchmarks report --readme"
    assert text.index(OPENING[0]) < text.index("## Quick start")
    links = re.findall(r"\]\(([^)#]+)\)", inside) + re.findall(r'src="([^"]+)"', opening)
    for link in links:
        assert (ROOT / link).is_file(), f"README.md links {link}, which is not there"
    found = readme.newest(ROOT)
    for run, paths in found:
        e = run.environment
        assert all(path.name in inside for path in paths)
        assert e.commit[:10] in inside and e.torch in inside
    measured_on_gpu = any(not run.environment.on_cpu for run, _ in found)
    assert (NO_GPU in inside) != measured_on_gpu
    assert measured_on_gpu or not opening


def put(root: Path, environment: Environment, name: str = "first.json") -> Path:
    path = root / readme.RESULTS / environment.slug / name
    save(made_up.small_results(environment), path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    opening = "\nold pictures\n".join(OPENING)
    text = f"# A title\n\n{opening}\n\n{BEGIN}\nold words\n{END}\n\nThe end.\n"
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    return tmp_path


def section(root: Path) -> str:
    before, inside, after = readme.between_markers((root / "README.md").read_text(encoding="utf-8"))
    assert before.startswith(f"# A title\n\n{OPENING[0]}\n"), "the rest is untouched"
    assert before.endswith(f"{OPENING[1]}\n\n")
    assert after == "\n\nThe end.\n"
    return inside


def opening(root: Path) -> str:
    return readme.between_markers((root / "README.md").read_text(encoding="utf-8"), *OPENING)[1]


def test_without_results_it_says_so(root: Path) -> None:
    assert readme.rewrite(root)
    assert section(root) == f"\n{NO_GPU}\n"
    assert opening(root) == ""


def test_a_cpu_file_is_headed_as_cpu(root: Path) -> None:
    put(root, made_up.CPU)
    readme.rewrite(root)
    inside = section(root)
    assert inside.index(NO_GPU) < inside.index("### CPU: Made-up processor") < inside.index(COUNTED)
    assert "GPU:" not in inside and "with uncommitted changes" in inside.replace("\n", " ")
    assert "It says nothing about a GPU." in inside.replace("\n", " ")


def test_a_gpu_stands_before_a_cpu_and_apart_from_it(root: Path) -> None:
    put(root, made_up.CPU)
    path = put(root, made_up.GPU)
    (path.parent / "overview.png").write_bytes(b"")
    (path.parent / "models.png").write_bytes(b"")
    readme.rewrite(root)
    inside = section(root)
    assert NO_GPU not in inside
    assert inside.count(COUNTED) == 2
    gpu, cpu = inside.split("### CPU: Made-up processor")
    assert "### GPU: Made-up H100" in gpu
    assert "driver 580.00, CUDA 13.0" in gpu.replace("\n", " ")
    assert "(benchmarks/results/made-up-h100/overview.png)" in gpu
    assert "[models](benchmarks/results/made-up-h100/models.png)" in gpu
    assert "[first.json](benchmarks/results/made-up-h100/first.json)." in gpu
    assert "H100" not in cpu


def test_rewriting_twice_changes_nothing_and_an_edit_is_seen(root: Path) -> None:
    put(root, made_up.GPU)
    assert readme.rewrite(root) and not readme.rewrite(root)
    path = root / "README.md"
    edited = path.read_text(encoding="utf-8").replace("1.24x", "1.42x")
    path.write_text(edited, encoding="utf-8")
    assert section(root) != readme.readme_table(root)
    assert readme.rewrite(root) and section(root) == readme.readme_table(root)


def test_newest_file_of_a_device_counts_whatever_it_is_called(root: Path) -> None:
    new = replace(made_up.GPU, timestamp="2026-05-05T00:00:00Z", torch="2.99.0")
    put(root, new, "a.json")
    put(root, made_up.GPU, "b.json")
    readme.rewrite(root)
    assert "torch 2.99.0" in section(root) and "b.json" not in section(root)


def test_a_later_part_of_a_suite_hides_no_other(root: Path) -> None:
    part = replace(made_up.GPU, timestamp="2026-05-05T00:00:00Z")
    path = put(root, made_up.GPU, "batch-norm.json")
    save(Results(part, list(made_up.model_rows())), path.with_name("models.json"))
    other = replace(made_up.GPU, timestamp="2025-01-01T00:00:00Z", commit="fedcba9876543210")
    put(root, other, "of-another-commit.json")
    inside = readme.readme_table(root)
    assert inside.count("### GPU: Made-up H100") == inside.count(COUNTED) == 1
    assert "Models: median time of a training step" in inside
    link = "(benchmarks/results/made-up-h100/{0}.json)"
    files = ", ".join(f"[{n}.json]{link.format(n)}" for n in ("batch-norm", "models"))
    assert f"Every row: {files}." in inside.replace("\n", " ")
    assert "of-another-commit" not in inside

    # and what a newer commit has not measured is not shown beside it
    put(root, replace(other, timestamp="2026-06-06T00:00:00Z"), "of-another-commit.json")
    inside = readme.readme_table(root)
    assert "fedcba9876" in inside and "of-another-commit.json" in inside
    assert "batch-norm.json" not in inside and "Models" not in inside


def test_models_have_a_table_of_their_own(root: Path) -> None:
    path = root / readme.RESULTS / made_up.GPU.slug / "models.json"
    save(Results(made_up.GPU, list(made_up.model_rows())), path)
    inside = readme.readme_table(root)
    assert "Models: median time of a training step, ms, and peak memory, MiB." in inside
    assert inside.count("| resnet50 |") == 1 and "| model |" not in inside


def test_it_opens_with_two_pictures_of_a_gpu(root: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the [bench] extra")
    models = list(made_up.model_rows())
    folder = root / readme.RESULTS / made_up.CPU.slug
    save(Results(made_up.CPU, models), folder / "models.json")
    assert report.report_readme(root) == 0
    assert opening(root) == ""  # models on a CPU say nothing of a GPU
    assert not (folder / SPEED).exists()

    folder = root / readme.RESULTS / made_up.GPU.slug
    save(Results(made_up.GPU, models), folder / "models.json")
    assert report.report_readme(root) == 0
    inside = opening(root)
    assert "Training steps on Made-up H100 at 0123456789, torch 2.11.0+cu130" in inside
    link = f"{readme.RESULTS.as_posix()}/{made_up.GPU.slug}"
    assert re.findall(r'src="([^"]+)"', inside) == [f"{link}/{SPEED}", f"{link}/{MEMORY}"]
    for name in (SPEED, MEMORY):
        assert (folder / name).stat().st_size > 1000
        assert name not in section(root)
    assert "(#performance)" in inside
    assert not readme.rewrite(root)

    # a picture alone, of a file whose models have no time, is not shown
    save(made_up.small_results(), folder / "models.json")
    assert readme.readme_opening(root) == ""


def test_host_and_device_stand_side_by_side(root: Path) -> None:
    def row(mode: str, provider: str, us: float, exponent: int = 16) -> Row:
        shape = [1 << exponent]
        return Row("activation", "silu", mode, shape, "flat", "float32", provider, us / 1e3)

    rows = [
        row("host", "torch", 4.0), row("host", "fastnorm-cuda", 6.0), row("host", "apex", 5.0),
        row("forward", "torch", 2.0), row("forward", "fastnorm-cuda", 1.5),
        row("host-backward", "torch", 8.0), row("host-backward", "fastnorm-triton", 20.0),
        row("host", "torch", 3.0, 12), row("forward", "torch", 7.0, 20),
    ]  # fmt: skip
    path = root / readme.RESULTS / made_up.GPU.slug / "host.json"
    save(Results(made_up.GPU, rows), path)
    inside = readme.readme_table(root)
    table = [line for line in inside.splitlines() if line.startswith("| activation silu |")]
    assert table == [
        "| activation silu | 2^16 | forward | 4.00 | 6.00 (1.50x) |  | 5.00 (1.25x) apex "
        "| 2.00 | 1.50 (0.75x) |  |  |",
        "| activation silu | 2^16 | backward | 8.00 |  | 20.0 (2.50x) |  |  |  |  |  |",
    ]
    names = "torch | host: fastnorm-cuda | host: fastnorm-triton | host: best other | device: torch"
    assert f"| layer | shape | direction | host: {names} | device: " in inside
    assert "with a cold L2 cache" in inside.replace("\n", " ")
    save(Results(made_up.CPU, rows), root / readme.RESULTS / made_up.CPU.slug / "host.json")
    assert readme.readme_table(root).count("| layer | shape |") == 1  # no device time of a CPU


def test_the_share_of_norms_before_and_after_is_told(root: Path) -> None:
    rows = [row for row in made_up.model_rows() if row.variant in ("resnet50", "vit_b_16")]
    for row in rows:
        share = {"torch": 0.375, "fastnorm": 0.2}.get(row.provider)
        if share and row.variant == "resnet50":
            given = {NORM: share, ACTIVATION: 0.0, MOVES: 0.1, REST: 0.9 - share}
            row.note = f"timm; {text(given)}"
    save(Results(made_up.GPU, rows), root / readme.RESULTS / made_up.GPU.slug / "models.json")
    told = "by the profiler: resnet50 torch 37.5%, fastnorm 20.0%."
    assert told in readme.readme_table(root).replace("\n", " ")


def test_the_command_draws_pictures_and_writes_the_section(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the [bench] extra")
    path = put(root, made_up.CPU)
    stale = path.parent / "of-an-older-file.png"
    stale.write_bytes(b"")
    assert report.report_readme(root) == 0
    assert "README.md is rewritten" in capsys.readouterr().out
    assert not stale.exists() and (path.parent / "overview.png").stat().st_size > 1000
    assert f"({readme.RESULTS.as_posix()}/{made_up.CPU.slug}/overview.png)" in section(root)
    assert report.report_readme(root) == 0
    assert "README.md is as the results say" in capsys.readouterr().out


def test_a_file_in_the_folder_of_another_device_is_refused(root: Path) -> None:
    path = root / readme.RESULTS / "made-up-h200" / "first.json"
    save(made_up.small_results(), path)
    with pytest.raises(ResultsError, match=r"is of 'Made-up H100': its folder is .*made-up-h100"):
        readme.readme_table(root)


@pytest.mark.parametrize("text", ["nothing", f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_readme_without_its_markers_is_refused(root: Path, text: str) -> None:
    (root / "README.md").write_text(text, encoding="utf-8")
    with pytest.raises(ResultsError, match=r"README.md must have <!-- benchmarks:begin -->"):
        readme.rewrite(root)


def test_a_readme_without_a_place_for_its_opening_is_refused(root: Path) -> None:
    text = f"{BEGIN}\n{END}\n"
    (root / "README.md").write_text(text, encoding="utf-8")
    with pytest.raises(ResultsError, match=r"README.md must have <!-- opening:begin -->"):
        readme.rewrite(root)
    assert (root / "README.md").read_text(encoding="utf-8") == text
