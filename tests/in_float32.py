"""The program, computing in float32 even where the processor has bfloat16, in which near neighbours change places."""

from tandemqa.cli import main
from tandemqa.encoders import backbone

if __name__ == "__main__":
    backbone.has_bfloat16 = lambda device: False
    main()
