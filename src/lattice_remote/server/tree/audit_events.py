"""What each of Python's audit events means to a command, for CPython 3.12 and 3.13: one table (I9).

Three answers. **Watched**: the capture looks at the paths. **Harmless**: it can do nothing to a file, a process or the
network that no other event reports. **Refused**: no lattice command has a use for it. An event that is not in the
table, of a newer Python or of another package, is refused too: whoever needs it decides here.
"""

__all__ = ["HARMLESS", "REFUSED", "WATCHED"]

WATCHED = frozenset(
    {
        "open",  # io.open, os.open
        "os.rename",  # and os.replace
        "os.remove",  # and os.unlink
        "os.mkdir",
        "os.rmdir",
        "os.truncate",  # and os.ftruncate
        "os.link",
        "os.symlink",
        "os.listdir",
        "os.scandir",
        "os.chmod",
        "os.chown",
        "os.utime",
        "os.getxattr",
        "os.listxattr",
        "os.setxattr",
        "os.removexattr",
    }
)

HARMLESS = frozenset(
    {
        # Python itself, importing and running what lies in its own directories: reading that is watched.
        *("import", "compile", "exec", "code.__new__", "function.__new__", "marshal.load", "marshal.loads"),
        *("marshal.dumps", "sys._getframe", "sys._getframemodulename", "sys.unraisablehook", "sys.excepthook"),
        *("object.__getattr__", "object.__setattr__", "object.__delattr__", "builtins.id", "array.__new__"),
        # Announcements of what is then done step by step, each step with its own event.
        *("shutil.copyfile", "shutil.copymode", "shutil.copystat", "shutil.copytree", "shutil.move", "shutil.rmtree"),
        *("tempfile.mkstemp", "tempfile.mkdtemp", "os.walk", "os.fwalk", "glob.glob", "glob.glob/2"),
        *("pathlib.Path.glob", "pathlib.Path.rglob", "pathlib.Path.walk"),
        # On descriptors, which were opened under the capture's eyes.
        *("fcntl.flock", "fcntl.lockf", "fcntl.fcntl", "os.lockf"),
        # Lattice's locks are waited for.
        "time.sleep",
    }
)

REFUSED = frozenset(
    {
        # Processes and threads: these do not come back under the capture's eyes.
        *("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn"),
        *("os.startfile", "os.startfile/2", "os.kill", "os.killpg", "signal.pthread_kill", "pty.spawn"),
        *("webbrowser.open", "_thread.start_new_thread", "_thread.start_joinable_thread"),
        # The network.
        *("socket.__new__", "socket.bind", "socket.connect", "socket.getaddrinfo", "socket.gethostbyaddr"),
        *("socket.gethostbyname", "socket.gethostname", "socket.getnameinfo", "socket.getservbyname"),
        *("socket.getservbyport", "socket.sendmsg", "socket.sendto", "socket.sethostname", "urllib.Request"),
        *("http.client.connect", "http.client.send", "ftplib.connect", "ftplib.sendcmd", "imaplib.open"),
        *("imaplib.send", "nntplib.connect", "nntplib.putline", "poplib.connect", "poplib.putline"),
        *("smtplib.connect", "smtplib.send", "telnetlib.Telnet.open", "telnetlib.Telnet.write"),
        # Files by ways of their own, and what changes where paths lead.
        *("sqlite3.connect", "sqlite3.connect/handle", "sqlite3.enable_load_extension", "sqlite3.load_extension"),
        *("mmap.__new__", "os.chdir", "os.fchdir", "os.chroot", "os.chflags", "os.lchflags", "os.lchmod"),
        *("os.add_dll_directory", "os.listdrives", "os.listmounts", "os.listvolumes", "shutil.chown"),
        *("shutil.make_archive", "shutil.unpack_archive", "fcntl.ioctl"),
        # The process: its environment goes to hooks, its memory and its hooks are the server's.
        *("os.putenv", "os.unsetenv", "resource.setrlimit", "resource.prlimit", "syslog.openlog", "syslog.closelog"),
        *("syslog.setlogmask", "syslog.syslog", "sys.addaudithook", "sys.setprofile", "sys.settrace"),
        *("sys.set_asyncgen_hook_firstiter", "sys.set_asyncgen_hook_finalizer", "sys.set_asyncgen_hooks_firstiter"),
        *("sys.set_asyncgen_hooks_finalizer", "sys._current_frames", "sys._current_exceptions"),
        *("sys.monitoring.register_callback", "sys.remote_exec", "gc.get_objects", "gc.get_referrers"),
        *("gc.get_referents", "setopencodehook", "cpython._PySys_ClearAuditHooks", "cpython.PyInterpreterState_New"),
        *("cpython.PyInterpreterState_Clear", "cpython.run_command", "cpython.run_file", "cpython.run_module"),
        *("cpython.run_interactivehook", "cpython.run_startup", "cpython.run_stdin", "ensurepip.bootstrap"),
        *("pdb.Pdb", "pickle.find_class", "builtins.breakpoint", "builtins.input", "builtins.input/result"),
        # Foreign code.
        *("ctypes.dlopen", "ctypes.dlsym", "ctypes.dlsym/handle", "ctypes.call_function", "ctypes.addressof"),
        *("ctypes.cdata", "ctypes.cdata/buffer", "ctypes.create_string_buffer", "ctypes.create_unicode_buffer"),
        *("ctypes.get_errno", "ctypes.set_errno", "ctypes.get_last_error", "ctypes.set_last_error"),
        *(
            "ctypes.seh_exception",
            "ctypes.set_exception",
            "ctypes.string_at",
            "ctypes.wstring_at",
            "ctypes.PyObj_FromPtr",
        ),
        *("ctypes.memoryview_at",),
    }
)
"""Named so that a reader finds every event; the capture refuses whatever is in neither of the other two."""
