"""The demonstration behind `python -m jaxsoftmax`.

It needs the extra `demo` (scikit-learn, matplotlib, tqdm), so nothing outside imports it.
"""
