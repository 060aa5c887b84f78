"""A linear softmax model, trained to convergence, against scikit-learn's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import sklearn.datasets
import sklearn.linear_model

import jaxsoftmax as jsm


@pytest.mark.asks_for_x64
def test_logistic_regression_on_digits():
    features, labels = sklearn.datasets.load_digits(return_X_y=True)
    features = features / 16
    penalty = 1.0
    theirs = sklearn.linear_model.LogisticRegression(
        C=penalty, solver="newton-cholesky", tol=1e-8, max_iter=100
    )
    expected = theirs.fit(features, labels).predict_proba(features)

    def scores(params):
        weight, bias = params[:640].reshape(64, 10), params[640:]
        return jnp.dot(features, weight) + bias[None]

    @jax.jit
    @jax.value_and_grad
    def objective(params):
        likelihood = jnp.sum(jsm.cross_entropy(scores(params), labels))
        return penalty * likelihood + jnp.sum(params[:640] ** 2) / 2

    found = scipy.optimize.minimize(
        objective, np.zeros(650), jac=True, method="L-BFGS-B", options={"gtol": 1e-6, "ftol": 0}
    )
    assert np.max(np.abs(found.jac)) < 1e-3
    p = jsm.softmax(scores(found.x))
    np.testing.assert_allclose(p, expected, atol=1e-5)
    assert np.mean(np.argmax(p, -1) == labels) > 0.98
