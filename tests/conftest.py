import os
import signal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# Shells without job control start commands in the background with SIGINT ignored, which children
# inherit; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
