"""Commands of `dpdmd-pipeline` beside `run`: a file with a function for each, quick to import."""
