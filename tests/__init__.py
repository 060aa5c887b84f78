"""The tests of jaxsoftmax; `cases.py` has the tables that most of them run over."""
