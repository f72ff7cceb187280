"""Chat and evaluation on cards of every size: resident where it fits, streamed where it does not."""

import pytest

from lowvram_tuner.config import TrainConfig
from lowvram_tuner.memory.budget import GB, MB, Budget
from lowvram_tuner.memory.reading import plan_chat, plan_evaluation
from lowvram_tuner.models.catalogue import shape_of

CONTEXT = 450 * MB


def chat(model, gb, bits=4, kind="vram"):
    config = TrainConfig(model=model, bits=bits)
    return plan_chat(config, shape_of(model), Budget(int(gb * GB), 0, int(gb * GB), kind, CONTEXT))


def test_a_large_card_holds_everything_as_it_is():
    plan = chat("Qwen/Qwen3-8B", 24)
    assert plan.fits and plan.streamed == 0 and plan.head_bits == 16 and not plan.embeddings_on_host


@pytest.mark.parametrize("gb", [5.2, 5.5, 7.5, 11, 22])
@pytest.mark.parametrize("model", ["Qwen/Qwen3-8B", "Qwen/Qwen3-14B", "Qwen/Qwen3-32B", "Llama-3.1-8B-Instruct"])
def test_what_can_be_trained_on_a_card_can_be_talked_to_there(model, gb):
    plan = chat(model, gb)
    assert plan.fits
    assert plan.process_bytes <= gb * GB
    assert plan.host_bytes > 0 or plan.streamed == 0


def test_speed_is_given_up_last_and_no_more_than_needed():
    """14B at 4 bits: 6.8 GB of layers. On 11 GB the word table moves; on 8 GB the head too; on 5.2 GB layers stream."""
    eleven, eight, five = (chat("Qwen/Qwen3-14B", gb) for gb in (11, 8.7, 5.2))
    assert (eleven.streamed, eight.streamed) == (0, 0) and five.streamed > 0
    assert eleven.embeddings_on_host and eight.embeddings_on_host
    assert eleven.head_bits >= eight.head_bits >= five.head_bits == 4
    assert five.process_bytes > 5.2 * GB - 250 * MB  # one layer fewer in the host would not fit


def test_less_memory_never_streams_less():
    streamed = [chat("Qwen/Qwen3-14B", gb / 10).streamed for gb in range(40, 120, 4)]
    assert streamed == sorted(streamed, reverse=True)


def test_a_card_that_is_too_small_says_by_how_much():
    plan = chat("Qwen/Qwen3-32B", 1.5)
    assert not plan.fits and "Too big by" in plan.words[0]


def test_without_a_card_everything_is_unpacked_in_ram():
    plan = chat("demo", 8, kind="ram")
    assert plan.fits and plan.unpacked and plan.streamed == 0


def test_evaluation_needs_no_cache_but_a_longer_pass():
    config = TrainConfig(model="Qwen/Qwen3-8B", bits=4, max_seq_length=4096)
    plan = plan_evaluation(config, shape_of(config.model), Budget(24 * GB, 0, 24 * GB, "vram", CONTEXT))
    short = plan_evaluation(TrainConfig(model=config.model, max_seq_length=512), shape_of(config.model), plan.budget)
    assert plan.components["activations"] == 0
    assert plan.components["layer_work"] == 8 * short.components["layer_work"]
