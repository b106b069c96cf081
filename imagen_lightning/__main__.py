"""`python -m imagen_lightning` is `imagen-lightning`."""

from imagen_lightning.cli.main import main

raise SystemExit(main())
