"""A compiled model that runs sparse. A script: `test_real_models.py` gives it a process of its own,
since Inductor imports setuptools, which fails where something else of distutils came before."""

import torch

import sparse_patch
from tests.robustness.real import SPARSE, as_loaded, assert_near, part_of, states


def main() -> None:
    real = as_loaded("smollm2")
    model, ids = part_of(real, 2), real.ids(400)
    with sparse_patch.patch(model, "flexprefill", min_length=0, **SPARSE["flexprefill"]) as handle:
        want = states(model, ids)
        compiled = torch.compile(model.get_decoder(), fullgraph=True)
        with torch.no_grad():
            got = compiled(input_ids=ids).last_hidden_state
    assert_near(got, want, 1e-4)
    assert handle.report().sparse_calls == 2 * 2
    assert handle.report().density < 1


if __name__ == "__main__":
    main()
