"""hvtrain, started by the path of this file (launcher.program) or by `python -m launcher`."""

if __name__ == "__main__":
    import os
    import sys

    # Python has put this folder (or with -m the working directory) in front of its own library. It goes
    # before the first import that a file there could answer; os and sys were loaded when Python started.
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if root not in sys.path:
        sys.path.append(root)  # a checkout that is not installed

    from launcher.cli import main

    sys.exit(main())
