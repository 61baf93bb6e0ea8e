"""RoPE against transformers' own tables and a float64 rotation."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

from data_gen.core.errors import InputError
from data_gen.core.rope import Rope

V4 = Rope(dims=64, theta=160000, positions=1 << 20, factor=16)
PLAIN = Rope(dims=16, theta=10000, positions=4096)
EDGES = (0, 65535, 65536, (1 << 20) - 1)


def reference(x, position, frequencies):
    """Rotate one vector in float64 by the fp32 angle that the rule prescribes."""
    angle = (np.float32(position) * frequencies).astype(np.float64)
    x = x.astype(np.float64)
    head, tail = x[: -2 * len(angle)], x[-2 * len(angle) :].reshape(-1, 2)
    turned = (tail[:, 0] + 1j * tail[:, 1]) * np.exp(1j * angle)
    return np.concatenate([head, np.stack([turned.real, turned.imag], axis=1).reshape(-1)])


def transformers_frequencies(**rope):
    config = DeepseekV4Config(num_hidden_layers=2, rope_parameters=rope or None)
    return DeepseekV4RotaryEmbedding(config).compress_inv_freq


def test_yarn_frequencies_are_transformers_own():
    theirs = transformers_frequencies(
        rope_type="yarn", factor=16.0, original_max_position_embeddings=65536, beta_fast=32, beta_slow=1
    )
    assert torch.equal(V4.frequencies(), theirs)


def test_plain_frequencies_are_transformers_own():
    assert torch.equal(V4.model_copy(update={"factor": 1.0}).frequencies(), transformers_frequencies())


def test_the_ramp_runs_from_pair_15_to_25():
    plain = V4.model_copy(update={"factor": 1.0}).frequencies()
    ratio = plain / V4.frequencies()
    assert torch.equal(ratio[:16], torch.ones(16))
    assert torch.equal(ratio[25:], torch.full((7,), 16.0))
    assert torch.all((ratio[16:25] > 1) & (ratio[16:25] < 16))


@pytest.mark.parametrize("rope", [V4, PLAIN], ids=["yarn", "plain"])
@given(position=st.one_of(st.sampled_from(EDGES), st.integers(0, (1 << 20) - 1)), seed=st.integers(0, 99))
def test_rotation_is_the_float64_reference(rope, position, seed):
    position %= rope.positions
    x = np.random.default_rng(seed).standard_normal(rope.dims * 2).astype(np.float32)
    turned = rope.rotate(torch.from_numpy(x), torch.tensor(position)).numpy()
    np.testing.assert_allclose(turned, reference(x, position, rope.frequencies().numpy()), atol=1e-6, rtol=0)
    assert np.array_equal(turned[: rope.dims], x[: rope.dims])


def test_the_table_is_the_rotation():
    positions = torch.tensor(EDGES)
    table = V4.table(positions)
    assert table.shape == (4, 32) and table.dtype == torch.complex64
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    turned = torch.view_as_real(torch.view_as_complex(x[:, 64:].reshape(4, 32, 2)) * table).flatten(1)
    torch.testing.assert_close(V4.rotate(x, positions)[:, 64:], turned, atol=1e-6, rtol=0)


def test_heads_share_a_position():
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([0, 7, 1 << 19])
    together = V4.rotate(x, positions[:, None])
    for row in range(3):
        assert torch.equal(together[row], V4.rotate(x[row], positions[row].expand(5)))


def test_positions_beyond_the_maximum_raise():
    V4.angles(torch.tensor([0, (1 << 20) - 1]))
    for bad in (1 << 20, -1):
        with pytest.raises(InputError, match=r"outside 0\.\.1048575"):
            V4.rotate(torch.zeros(1, 128), torch.tensor([bad]))


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="even"):
        Rope(dims=3, theta=1e4, positions=10)
    with pytest.raises(ValueError, match="beta_fast"):
        Rope(dims=4, theta=1e4, positions=10, factor=2, beta_fast=1, beta_slow=2)


def test_a_transformers_config_describes_it():
    yarn = {"rope_type": "yarn", "rope_theta": 160000, "factor": 16.0, "original_max_position_embeddings": 65536,
            "beta_fast": 32, "beta_slow": 1, "attention_factor": 1.0}  # fmt: skip
    assert Rope.from_parameters(yarn, 64, 1 << 20) == V4
    plain = {"rope_type": "default", "rope_theta": 10000}
    assert Rope.from_parameters(plain, 16, 4096) == PLAIN
    with pytest.raises(InputError, match="unknown RoPE type 'llama3'"):
        Rope.from_parameters(plain | {"rope_type": "llama3"}, 16, 4096)
