"""What a base cannot take is said from its shapes alone."""

from common.config import load
from common.errors import UserError
from common.model import fit

import pytest


def config(base, *words: str):
    return load(str(base), ["lora.rank=4", *words])


def test_what_fits_passes_and_an_unknown_hub_id_is_left_to_the_run(tiny_base):
    fit.need_fit(config(tiny_base))
    fit.need_fit(config(tiny_base, "lora.targets=[q_proj]", "window.context=1952"))
    fit.need_fit(load("nobody/has-this", ["lora.targets=[x_proj]"]))
    fit.need_fit(load("qlora7b"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora.targets=[q_proj,v_prj]"], r"no linear layer v_prj — did you mean \"v_proj\"\?; it has down_proj, gate"),
        (["lora.targets=[proj]"], "no linear layer proj"),
        (["lora.targets=[embed_tokens]"], "no linear layer embed_tokens"),
        (["window.context=1953"], "window: 2049 tokens, and the base has 2048 positions"),
    ],
)
def test_what_does_not_fit_is_named(tiny_base, words, message):
    with pytest.raises(UserError, match=message):
        fit.need_fit(config(tiny_base, *words))


def test_a_hub_id_whose_shapes_are_known_is_checked_without_the_hub():
    with pytest.raises(UserError, match="no linear layer c_attn"):
        fit.need_fit(load("qlora7b", ["lora.targets=[c_attn]"]))
    with pytest.raises(UserError, match="and the base has 4096 positions"):
        fit.need_fit(load("qlora7b", ["window.context=4096"]))
