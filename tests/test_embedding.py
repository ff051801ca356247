"""Ids in, logits out: the two tables at the ends of the model."""

import torch
from small import as_float64, assert_close, assert_same, numbers, random_config, random_ids, random_model, randomised, small_config

from k2.embedding import OutputHead


@torch.no_grad()
def test_an_id_becomes_its_row_and_nothing_else():
    config = small_config()
    embedding = random_model(config).model.embed_tokens
    ids_T = random_ids(config, 2, 3, 5)
    x_TD = embedding(ids_T)
    assert x_TD.shape == (2, 3, 5, config.hidden_size)
    for where in ((0, 0, 0), (0, 2, 1), (1, 1, 4)):
        assert_same(x_TD[where], embedding.weight[ids_T[where]])


@torch.no_grad()
def test_the_first_and_the_last_id_have_rows():
    config = small_config()
    embedding = random_model(config).model.embed_tokens
    assert_same(embedding(torch.tensor([0, 96])), embedding.weight[[0, -1]])


def test_head_is_a_product_with_every_row_of_its_own_table():
    for seed in range(20):
        for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            config = random_config(seed)
            head = randomised(OutputHead(config), seed, dtype)
            x_TD = numbers(2, 5, config.hidden_size, seed=seed, dtype=dtype)
            assert_close(head(x_TD), as_float64(x_TD) @ as_float64(head.weight).T, limit, f"seed {seed}")


def test_the_two_tables_are_not_tied():
    model = random_model(small_config())
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_logits_are_float32_at_least():
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        head = randomised(OutputHead(small_config()), 0, dtype)
        assert head(numbers(3, 48, dtype=dtype)).dtype == wide
