"""Two transformers whose weights are set by hand: what an induction head is, without any training.

The residual stream has a direction for each token ("this token is here") and another one for each
token ("the token before this one was"). Positions live elsewhere: with a base this large only the
first few sines and cosines turn at all.
"""

import torch

from model import ModelConfig, Transformer

D_MODEL, D_HEAD, N_TOKENS = 256, 32, 30
HERE, BEFORE = slice(60, 60 + N_TOKENS), slice(94, 94 + N_TOKENS)
SINES, COSINES = torch.arange(12), torch.arange(128, 140)
SHARP = 30.0  # how decided the heads are


def empty_model(n_layers, smear=False):
    config = ModelConfig(
        n_layers=n_layers,
        d_model=D_MODEL,
        n_heads=2,
        d_head=D_HEAD,
        d_mlp=0,
        n_ctx=512,
        d_vocab=N_TOKENS,
        smear=smear,
        position_scale=4.0,
        position_base=1e30,
        position_max_frequency=2.5,
    )
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.zero_()
        model.embed["W_E"][:, HERE] = torch.eye(N_TOKENS)
        model.unembed["W_U"][HERE, :] = torch.eye(N_TOKENS)
    return model


@torch.no_grad()
def attend_to_the_previous_token(attn, head, positions):
    """Rotates the query's sines and cosines one token back, so that they agree best with the
    previous token's.
    """
    angle = torch.atan2(positions[1, SINES], positions[1, COSINES])  # radians a token
    sine, cosine = torch.arange(12), torch.arange(12, 24)
    W_Q, W_K = attn.W_Q[head], attn.W_K[head]
    W_K[SINES, sine] = W_K[COSINES, cosine] = 1.0
    W_Q[SINES, sine], W_Q[COSINES, sine] = SHARP * angle.cos(), -SHARP * angle.sin()
    W_Q[SINES, cosine], W_Q[COSINES, cosine] = SHARP * angle.sin(), SHARP * angle.cos()


@torch.no_grad()
def move(attn, head, source, target):
    """What stands in the `source` directions where the head attends is added to the `target`
    directions here.
    """
    attn.W_V[head, source, :N_TOKENS] = torch.eye(N_TOKENS)
    attn.W_O[head, :N_TOKENS, target] = torch.eye(N_TOKENS)


@torch.no_grad()
def match(attn, head, query, key):
    """Attends where the `key` directions hold the token that the `query` directions hold here."""
    attn.W_Q[head, query, :N_TOKENS] = SHARP * torch.eye(N_TOKENS)
    attn.W_K[head, key, :N_TOKENS] = torch.eye(N_TOKENS)


def induction_circuit():
    """Head 0:0 notes at every token which one came before it; head 1:1 looks for the present token
    in those notes, and copies the token that it finds there. [A][B] ... [A] -> [B]
    """
    model = empty_model(n_layers=2)
    attend_to_the_previous_token(model.blocks[0].attn, 0, model.positions)
    move(model.blocks[0].attn, 0, HERE, BEFORE)
    match(model.blocks[1].attn, 1, query=HERE, key=BEFORE)
    move(model.blocks[1].attn, 1, HERE, HERE)
    return model


def smeared_induction_circuit():
    """One layer: with keys smeared all the way, each key already is the previous token's."""
    model = empty_model(n_layers=1, smear=True)
    with torch.no_grad():
        model.blocks[0].attn.alpha[1] = -20.0
    match(model.blocks[0].attn, 1, query=HERE, key=HERE)
    move(model.blocks[0].attn, 1, HERE, HERE)
    return model
