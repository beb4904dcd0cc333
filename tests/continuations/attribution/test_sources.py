"""Which latents become sources where there are more than memory allows."""

import torch

from saelens_ext.continuations.attribution.sources import _strongest


def test_of_one_hot_codes_no_more_are_kept_than_allowed_and_the_first_ones():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randint(50, (40,), generator=generator)
    codes = torch.nn.functional.one_hot(latents, 50).float()
    # As the norms of unit rows come out of another kernel.
    norms = 1 + 1e-7 * torch.randn(50, generator=generator)
    kept = _strongest(codes, norms, range(1, 40), 12)
    assert kept.nonzero().tolist() == [[p, int(latents[p])] for p in range(1, 13)]
