"""``tripletjax serve``."""

from tripletjax.apps import serve
from tripletjax.apps.verification.calibration import Calibration
from tripletjax.cli.common import open_embedder, updated_index
from tripletjax.cli.options import Serve


def call(options: Serve) -> int:
    embedder, calibration = open_embedder(options), None
    try:
        calibration = Calibration.read(options.home, embedder.key)
    except FileNotFoundError as error:
        print(f"- {error}")
    index, _ = updated_index(options.index, options, embedder)
    gallery = None
    if options.gallery is not None:
        gallery, _ = updated_index(options.gallery, options, embedder)
    app = serve.App.of(index, calibration=calibration, gallery_index=gallery)
    serve.run(app, host=options.host, port=options.port)
    return 0
