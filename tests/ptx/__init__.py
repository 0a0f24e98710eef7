"""An interpreter of PTX: runs the code that a GPU would run on the CPU, and checks what compute-sanitizer would."""
