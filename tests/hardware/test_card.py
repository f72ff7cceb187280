"""card.py against a fake NVML: every way a driver, a card or a permission can be missing."""

from __future__ import annotations

import platform
import time
from types import SimpleNamespace

import pynvml
import pytest
from fake_nvml import GB, FakeCard, FakeNvml

from lowvram_tuner.hardware import card as card_module
from lowvram_tuner.hardware.card import Card, process_bytes, read_card, why_no_card


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, request):
    """Each test starts with NVML not yet initialized and, unless it asks a real card, no card named by the environment."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    card_module._nvml.cache_clear()
    yield
    card_module._nvml.cache_clear()


@pytest.fixture
def cards(monkeypatch):
    """Installs a fake NVML with the given cards."""

    def install(*found: FakeCard, **options: int) -> None:
        FakeNvml(*found, **options).install(monkeypatch)

    return install


def test_reads_what_the_driver_says(cards):
    cards(FakeCard(free=4 * GB))
    card = read_card()
    assert card == Card(
        name="Fake 6 GB Laptop GPU", total_bytes=6 * GB, free_bytes=4 * GB, used_bytes=2 * GB, driver="580.65.06",
        compute_capability=(8, 6), index=0, uuid="GPU-00000000-aaaa", pcie_generation=4, pcie_width=8,
        may_spill=card.may_spill, cards=1,
    )  # fmt: skip
    assert why_no_card() == ""


def test_every_reading_is_fresh_and_quick(cards):
    one = FakeCard()
    cards(one)
    assert read_card().free_bytes == 5 * GB
    one.free = 1 * GB
    started = time.perf_counter()
    assert read_card().free_bytes == 1 * GB
    assert time.perf_counter() - started < 0.05


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "no NVIDIA driver is installed."),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "the NVIDIA driver is installed but not loaded; restart the computer."),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "the NVIDIA driver was updated while the computer was running; restart it."),
        (pynvml.NVML_ERROR_UNKNOWN, "the NVIDIA driver answers 'Unknown Error'; restart the computer or reinstall the driver."),
    ],
)
def test_no_driver_is_no_card_and_says_why(cards, code, sentence):
    cards(starts=code)
    assert read_card() is None
    assert process_bytes(1) == 0
    assert why_no_card() == sentence


def test_a_driver_without_a_card(cards):
    cards()
    assert read_card() is None
    assert "sees no card" in why_no_card()


def test_a_driver_that_wakes_up_later_is_found(cards):
    cards(starts=pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    assert read_card() is None
    cards(FakeCard())
    assert read_card().total_bytes == 6 * GB


@pytest.mark.parametrize(
    ("refused", "field", "value"),
    [
        ("nvmlDeviceGetName", "name", "NVIDIA card"),
        ("nvmlDeviceGetUUID", "uuid", ""),
        ("nvmlDeviceGetCudaComputeCapability", "compute_capability", (0, 0)),
        ("nvmlDeviceGetMaxPcieLinkGeneration", "link_bytes_per_s", 0.0),
    ],
)
def test_a_fact_the_driver_refuses_becomes_empty(cards, refused, field, value):
    cards(FakeCard(refuses={refused: pynvml.NVML_ERROR_NO_PERMISSION}))
    card = read_card()
    assert getattr(card, field) == value
    assert card.total_bytes == 6 * GB


def test_a_card_without_a_memory_reading_is_no_card(cards):
    cards(FakeCard(refuses={"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_NOT_SUPPORTED}))
    assert read_card() is None
    assert "does not say how much memory" in why_no_card()


def test_a_lost_card_is_no_card(cards):
    cards(FakeCard(refuses={"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_GPU_IS_LOST}))
    assert read_card() is None


SMALL = FakeCard(name="small", uuid="GPU-aaaa-1", total=2 * GB, free=1 * GB)
BIG = FakeCard(name="big", uuid="GPU-bbbb-2", total=24 * GB, free=20 * GB)


@pytest.mark.parametrize(
    ("visible", "name", "index"),
    [
        (None, "big", 1),
        ("0", "small", 0),
        ("1,0", "big", 1),
        ("GPU-aaaa", "small", 0),
        ("GPU-bbbb-2", "big", 1),
    ],
)
def test_which_of_two_cards(cards, monkeypatch, visible, name, index):
    cards(SMALL, BIG)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    card = read_card()
    assert (card.name, card.index, card.cards) == (name, index, 2)


@pytest.mark.parametrize("visible", ["", "-1", "7", "NoDevFiles", "GPU-cccc"])
def test_hidden_cards_are_no_card(cards, monkeypatch, visible):
    cards(SMALL, BIG)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert read_card() is None
    assert repr(visible) in why_no_card()


def test_equal_cards_give_the_first(cards):
    cards(FakeCard(uuid="GPU-a"), FakeCard(uuid="GPU-b"))
    assert read_card().uuid == "GPU-a"


def sliced() -> FakeCard:
    """A large card cut into a 10 and a 20 GB slice."""
    parts = [
        FakeCard(name="slice", uuid="MIG-1", total=10 * GB, free=9 * GB, processes={7: GB}),
        FakeCard(name="slice", uuid="MIG-2", total=20 * GB, free=20 * GB, processes={8: 2 * GB}),
    ]
    return FakeCard(name="whole", uuid="GPU-w", total=80 * GB, free=79 * GB, capability=(9, 0), slices=parts)


@pytest.mark.parametrize(("visible", "uuid", "total"), [(None, "MIG-1", 10), ("MIG-2", "MIG-2", 20), ("0", "MIG-1", 10)])
def test_a_slice_counts_not_the_whole_card(cards, monkeypatch, visible, uuid, total):
    cards(sliced())
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    card = read_card()
    assert (card.uuid, card.total_bytes) == (uuid, total * GB)
    assert card.compute_capability == (9, 0)


def test_bytes_of_a_process(cards):
    cards(FakeCard(processes={11: 3 * GB, 12: None}))
    assert process_bytes(11) == 3 * GB
    assert process_bytes(12) == 0  # Windows' display driver model does not say
    assert process_bytes(13) == 0


def test_bytes_of_a_process_in_a_slice(cards):
    cards(sliced())
    assert process_bytes(7) == GB
    assert process_bytes(8) == 0


def test_process_bytes_where_the_driver_refuses(cards):
    cards(FakeCard(refuses={"nvmlDeviceGetComputeRunningProcesses": pynvml.NVML_ERROR_NO_PERMISSION}))
    assert process_bytes(11) == 0


def test_link_rate(cards):
    cards(FakeCard(link=(4, 8)))
    assert read_card().link_bytes_per_s == pytest.approx(15.75e9, rel=0.01)


def test_spilled_bytes_is_what_cannot_be_on_the_card(cards):
    cards(FakeCard(free=1 * GB))
    assert read_card().spilled_bytes(4 * GB) == 0
    assert read_card().spilled_bytes(7 * GB) == 2 * GB


@pytest.mark.parametrize(("release", "spills"), [("5.15.167.4-microsoft-standard-WSL2", True), ("6.1.0-18-amd64", False)])
def test_wsl_may_spill(cards, monkeypatch, release, spills):
    cards(FakeCard())
    monkeypatch.setattr(platform, "uname", lambda: SimpleNamespace(release=release))
    assert read_card().may_spill is spills


@pytest.mark.gpu
def test_agrees_with_cuda():
    import torch

    card = read_card()
    properties = torch.cuda.get_device_properties(0)
    assert card.compute_capability == (properties.major, properties.minor)
    assert card.total_bytes == pytest.approx(properties.total_memory, rel=0.06)  # the driver keeps a few percent
