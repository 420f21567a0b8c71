"""Studies: the paper's experiments on data that anybody can get, one module each."""
