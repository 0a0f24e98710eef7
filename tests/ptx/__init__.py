"""An interpreter of PTX: the code of a GPU on the CPU, checked as compute-sanitizer would."""
