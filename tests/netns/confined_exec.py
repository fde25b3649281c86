"""The last step of confined.py, as the final user: no writable code, the syscall filter, then the program itself."""

import ctypes
import os
import sys

libc = ctypes.CDLL(None, use_errno=True)
data = open(sys.argv[1], "rb").read()  # noqa: SIM115  the process image is replaced below


class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


if libc.prctl(65, 1, 0, 0, 0) != 0 and ctypes.get_errno() != 22:  # PR_SET_MDWE; kernels before 6.3 do not know it
    raise OSError(ctypes.get_errno(), "PR_SET_MDWE")
if libc.prctl(22, 2, ctypes.byref(Program(len(data) // 8, data)), 0, 0) != 0:  # PR_SET_SECCOMP, a filter
    raise OSError(ctypes.get_errno(), "PR_SET_SECCOMP")
os.execv(sys.argv[2], sys.argv[2:])
