"""Energy counters: of a made-up /sys/class/powercap, and of a library with NVML's functions."""

import shutil
import subprocess
from pathlib import Path

import pytest

from edgetune.train import energy
from edgetune.train.energy import EnergyMeter, nvml_boards, rapl_packages

GPU = "GPU-12345678"


def zone(powercap: Path, folder: str, name: str, energy_uj: int, most_uj: int = 10_000_000) -> Path:
    path = powercap / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    (path / "max_energy_range_uj").write_text(f"{most_uj}\n")
    return path


def count(path: Path, energy_uj: int) -> None:
    (path / "energy_uj").write_text(f"{energy_uj}\n")


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A library with NVML's functions, and the folder of what its card answers."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library, answers = tmp_path / "nvml.so", tmp_path / "card"
    source = Path(__file__).parent / "nvml_stub.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    answers.mkdir()
    monkeypatch.setenv("NVML_STUB", str(answers))
    return str(library), answers


def test_packages_are_added_and_the_parts_and_the_whole_around_them_are_not(tmp_path):
    first = zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 2_000_000)
    others = [
        zone(tmp_path, "intel-rapl:0:0", "core", 0),
        zone(tmp_path, "intel-rapl:2", "psys", 0),
        zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0),
    ]
    with EnergyMeter(powercap=tmp_path) as meter:
        count(first, 4_600_000)
        count(second, 5_600_000)
        for other in others:
            count(other, 9_000_000)
        measured = meter.read()
    assert measured is not None
    # 3.6 J + 3.6 J, 3600 J a Wh
    assert measured.watt_hours == pytest.approx(0.002, rel=1e-12)
    assert measured.source == "RAPL packages"


def test_a_counter_that_began_at_zero_again_went_on(tmp_path):
    path = zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000, most_uj=10_000_000)
    (package,) = rapl_packages(tmp_path)
    count(path, 500_000)
    assert package.joules() == 1.5  # 1 J to the end of the range, 0.5 J after
    count(path, 200_000)
    assert package.joules() == 11.2  # and 9.7 J for another time around
    count(path, 300_000)
    assert package.joules() == 11.3


def test_the_thread_sees_a_counter_go_around_between_two_readings(tmp_path, monkeypatch):
    path = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    monkeypatch.setattr(energy, "POLL_SECONDS", 0.01)
    with EnergyMeter(powercap=tmp_path) as meter:
        counter = meter._counters["RAPL packages"][0]
        for value in (6_000_000, 2_000_000, 8_000_000):
            count(path, value)
            for _ in range(1000):
                if counter._last == value:
                    break
                meter._stopped.wait(0.01)
        measured = meter.read()
    assert measured is not None
    assert measured.watt_hours == pytest.approx(18 / 3600)  # 6 + (10 - 6 + 2) + 6 J


def test_start_begins_anew(tmp_path):
    path = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    with EnergyMeter(powercap=tmp_path) as meter:
        count(path, 3_000_000)
        meter.start()
        count(path, 3_600_000)
        measured = meter.read()
    assert measured is not None
    assert measured.watt_hours == pytest.approx(0.6 / 3600)


def test_nothing_that_counts_gives_no_number_and_no_error(tmp_path):
    for powercap in (tmp_path / "absent", tmp_path):
        with EnergyMeter(powercap=powercap, gpus=(GPU,), nvml="libabsent.so.1") as meter:
            assert meter.read() is None
    (zone(tmp_path, "intel-rapl:0", "package-0", 0) / "energy_uj").write_text("odd\n")
    with EnergyMeter(powercap=tmp_path) as meter:
        assert meter.read() is None


def test_a_counter_that_can_not_be_read_any_longer_gives_no_part_of_a_sum(tmp_path):
    first = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 0)
    with EnergyMeter(powercap=tmp_path) as meter:
        count(first, 5_000_000)
        (second / "energy_uj").unlink()
        assert meter.read() is None
        (second / "energy_uj").write_text("1\n")
        assert meter.read() is None, "what was missed is not known"


def test_one_of_several_packages_that_may_not_be_read_leaves_no_number(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    (zone(tmp_path, "intel-rapl:1", "package-1", 0) / "energy_uj").unlink()
    with pytest.raises(OSError, match="energy_uj"):
        rapl_packages(tmp_path)


def test_a_card_counts_millijoules_itself(stub):
    library, answers = stub
    (answers / "energy_mj").write_text("5000")
    (board,) = nvml_boards([GPU], library)
    assert board.joules() == 0.0
    (answers / "energy_mj").write_text("12250")
    assert board.joules() == 7.25


def test_card_and_packages_are_added_and_both_are_named(stub, tmp_path):
    library, answers = stub
    (answers / "energy_mj").write_text("0")
    path = zone(tmp_path / "powercap", "intel-rapl:0", "package-0", 0)
    with EnergyMeter(powercap=tmp_path / "powercap", gpus=(GPU,), nvml=library) as meter:
        (answers / "energy_mj").write_text("3600000")
        count(path, 7_200_000)
        measured = meter.read()
    assert measured is not None
    assert measured.watt_hours == pytest.approx(1.002)
    assert measured.source == "RAPL packages + NVML, GPU board"


def test_the_power_of_a_card_without_a_counter_is_summed_over_time(stub, monkeypatch):
    library, answers = stub
    seconds = iter([10.0, 12.0, 13.0])
    monkeypatch.setattr(energy.time, "monotonic", lambda: next(seconds))
    (answers / "power_mw").write_text("100000")
    (board,) = nvml_boards([GPU], library)
    (answers / "power_mw").write_text("200000")
    assert board.joules() == 300.0  # 150 W on average, 2 s
    assert board.joules() == 500.0  # 200 W, 1 s


def test_a_card_that_is_not_there_or_measures_nothing_is_an_error_of_nvml(stub):
    library, _ = stub
    with pytest.raises(OSError, match="GPU-0: NVML answers with error 6"):
        nvml_boards(["GPU-0"], library)
    with pytest.raises(OSError, match=f"{GPU}: NVML answers with error 3"):
        nvml_boards([GPU], library)
    assert EnergyMeter(powercap=Path("/absent"), gpus=(GPU,), nvml=library).start().read() is None
