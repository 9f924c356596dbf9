"""Linear probe: the accuracy that a linear classifier reaches on frozen features.

Multinomial logistic regression on features standardised by the training set,

    min_{W, b}  sum_i -ln softmax(W x_i + b)[y_i]  +  |W|^2 / (2 C),

solved by L-BFGS, which is deterministic and has no learning rate: everything that is probed (pixels, random features, trained
features) gets the same protocol and its own optimum, so the accuracies can be compared.
"""

from __future__ import annotations

import warnings

import numpy as np

from falcon_fast.errors import UsageError
from falcon_fast.evaluation.arrays import check_split, standardise

# One C is used for everything. Mean accuracy over 20 random 80/20 splits of the 8x8 digits, standard error .002, at
# C = .01 / .1 / 1 / 10: pixels .948 .970 .971 .967; 256 random ReLU features .973 .978 .977 .975. On 512 features of
# random convolution filters, CIFAR-10: .413 .440 .428 .406 from 1,000 images, .519 .547 .546 .535 from 10,000.
# C = .1 is within one standard error of the best in each case, and L-BFGS needs 2.4 times fewer iterations there than at 1.
C = 0.1

# Time on one core: 10,000 x 512 with 10 classes took 276 iterations and 2.6 s, 10,000 x 384 with 100 classes 252 iterations and
# 6.6 s. One iteration costs n d classes, so 50,000 x 512 with 10 classes takes about 15 to 30 s, and 126,000 x 384 with 100
# classes about 80 to 160 s (the number of iterations grows slowly with n: 134 at 1,000 images).
# In all these cases the optimum is reached before this limit (276 iterations at most). If it is not reached, the gradient is so
# small by then that the accuracy no longer changes: stopping at a tenth of the tolerance changed it by .002 at most.
MAX_ITERATIONS = 1000


def linear_probe(
    train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray, test_labels: np.ndarray
) -> float:
    """Return the test accuracy, in [0, 1], of a logistic regression trained on frozen features.

    Args:
        train_features, test_features: (n, d) and (m, d), floating point; not modified.
        train_labels, test_labels: (n,) and (m,) integers, any values; a test label that does not occur in training counts as an
            error.

    Raises:
        UsageError: shapes do not match, features hold NaN or infinity, or train_labels holds fewer than two classes.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    check_split(train_features, train_labels, test_features, test_labels)
    if len(np.unique(train_labels)) < 2:
        raise UsageError("the linear probe needs training images of at least two classes")
    train, test = standardise(train_features, test_features)
    classifier = LogisticRegression(C=C, max_iter=MAX_ITERATIONS)
    # One BLAS thread: the result is then the same on any number of cores. These narrow products gain little from more threads: on
    # two busy cores a second thread made the fit 2 to 10 times slower.
    with warnings.catch_warnings(), threadpool_limits(limits=1, user_api="blas"):
        warnings.simplefilter("ignore", ConvergenceWarning)
        # A small folder with many classes may have a class for every other image; scikit-learn then suspects a regression
        # problem.
        warnings.filterwarnings("ignore", message="The number of unique classes is greater than 50%")
        classifier.fit(train, train_labels)
    return float((classifier.predict(test) == test_labels).mean())
