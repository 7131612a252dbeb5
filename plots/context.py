"""What context is worth: the loss and its slope by position, out of noisy means over examples.

The paper's heat maps are of 10,000 examples. Of a few hundred, the mean loss at one position is off
by a tenth of a nat, as much as context changes it. Neighbours share the noise out: at every place a
straight line in ln(position) is fitted to the positions around it, near ones counting most.
"""

import numpy as np

# standard deviation of the weights in ln(position): a factor of 1.5 to either side. Half of that
# leaves stripes, which are the examples' own (a hard word at position 9); twice that smears the
# bend at position 50.
REACH = 0.4
FIRST = 6  # before it too few positions are within reach to tell a slope
N_PLACES = 64


def fitted_lines(loss_by_position):
    """loss_by_position [..., pos] -> (position [place], loss [..., place], slope [..., place]), for
    places evenly spaced in ln(position): the height there of the fitted line, nats, and its slope
    d loss / d ln(position), nats for an e-fold of context ("loss derivatives").
    """
    n_ctx = loss_by_position.shape[-1]
    log_position = np.log(np.arange(1, n_ctx + 1))
    places = np.linspace(np.log(FIRST), np.log(n_ctx), N_PLACES)
    height, slope = line_weights(log_position, places)
    return np.exp(places), loss_by_position @ height, loss_by_position @ slope


def line_weights(x, places):
    """What the value at each x counts in the height and in the slope at each place: two arrays
    [x, place].
    """
    away = x[:, None] - places
    weight = np.exp(-0.5 * (away / REACH) ** 2)
    weight /= weight.sum(axis=0)
    centre = (weight * away).sum(axis=0)
    slope = weight * (away - centre)
    slope /= (slope * away).sum(axis=0)
    return weight - centre * slope, slope
