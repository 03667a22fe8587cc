"""The routes."""

import asyncio
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from stdist.errors import InputError
from stdist.serving.answers import UnknownPlace, as_csv, as_json, find, places_json
from stdist.serving.forecasts import CityForecasts, Latest
from stdist.serving.limits import Limits, Rate
from stdist.serving.metrics import Counted, Metrics, age

PAGE = Path(__file__).with_name("page.html")
ROUTES = frozenset({"/", "/forecast", "/places", "/health", "/metrics"})
HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


def make_app(forecasts: CityForecasts, metrics: Metrics, rate: float, token: str | None) -> FastAPI:
    """``rate``: requests a second of one client, any number where 0. ``token``: what every route but /health asks for,
    nothing where None."""
    app = FastAPI(title="stdist serve", docs_url=None, redoc_url=None)  # those pages load scripts from elsewhere
    page = PAGE.read_bytes()

    async def latest() -> Latest:
        found = await forecasts.latest()
        metrics.hits.inc(found.hit)
        return found

    @app.get("/forecast")
    async def forecast(
        request: Request,
        places: Annotated[str, Query(description="ids with commas between them, or all")] = "all",
        format: Annotated[str, Query(pattern="^(json|csv)$", description="of the answer; by Accept if absent")] = "",
        quantiles: Annotated[bool, Query(description="of a calibrated run")] = True,
        history: Annotated[bool, Query(description="in JSON, the last frames too")] = False,
    ) -> Response:
        found = await latest()
        city = found.city
        some = await asyncio.to_thread(find, city, places)
        header = city.header
        headers = HEADERS | {
            "x-stdist-origin": f"{city.origin.astype('datetime64[s]')}Z",
            "x-stdist-store-digest": header.metadata.contract.store_digest,
            "x-stdist-superseded": str(found.superseded).lower(),
            "vary": "accept",
        }
        if (format or ("csv" if "text/csv" in request.headers.get("accept", "") else "json")) == "csv":
            body = await asyncio.to_thread(as_csv, city, some, quantiles)
            return Response(body, media_type="text/csv", headers=headers)
        marks = {"superseded": found.superseded, "problem": found.problem}
        body = await asyncio.to_thread(as_json, city, some, quantiles, history, **marks)
        return Response(body, media_type="application/json", headers=headers)

    @app.get("/places")
    async def places() -> Response:
        body = await asyncio.to_thread(places_json, (await latest()).city)
        return Response(body, media_type="application/json", headers=HEADERS)

    @app.get("/health")
    async def health() -> Response:
        """503 where no forecast can be made of the store as it is; what is served then is the one before."""
        forecasts.look()
        problem, city = forecasts.problem, forecasts.city
        metadata = city.header.metadata
        content = {
            "status": "ok" if problem is None else "behind",
            "problem": problem,
            "model": {"run": metadata.run, "checkpoint": metadata.checkpoint, "calibration": metadata.calibration},
            "store_digest": metadata.contract.store_digest,
            "last_frame": f"{city.origin.astype('datetime64[s]')}Z",
            "last_frame_local": str(city.history_local[-1].astype("datetime64[s]")),
            "age_seconds": round(age(city.origin), 1),
        }
        return JSONResponse(content, 200 if problem is None else 503, HEADERS)

    @app.get("/metrics")
    async def as_text() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8", headers=HEADERS)

    @app.get("/")
    async def index() -> Response:
        return Response(page, media_type="text/html", headers=HEADERS | {"content-security-policy": PAGE_POLICY})

    def refusal(code: int, line: str) -> JSONResponse:
        return JSONResponse({"error": line}, code, HEADERS)

    @app.exception_handler(InputError)
    async def _wrong(request: Request, error: Exception) -> Response:
        return refusal(404 if isinstance(error, UnknownPlace) else 400, str(error))

    @app.exception_handler(RequestValidationError)
    async def _unread(request: Request, error: Any) -> Response:
        first = error.errors()[0]
        return refusal(422, f"{first['loc'][-1]}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def _no_route(request: Request, error: Any) -> Response:
        return refusal(error.status_code, f"{error.detail}; the routes are {', '.join(sorted(ROUTES))}")

    app.add_middleware(Limits, rate=Rate(rate) if rate else None, token=token)
    app.add_middleware(Counted, metrics=metrics)
    return app
