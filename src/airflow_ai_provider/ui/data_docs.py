"""Show the Data Docs of a batch: the API server reads the page from the store, for whoever may read the DAG's XComs.

Invariants: nothing but a batch's own page can be asked for; the page is made of rows from outside and runs in an origin
of its own, so that a script in it, should one get there, meets no session.
"""

from __future__ import annotations

from typing import Annotated

from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
from airflow.api_fastapi.core_api.security import requires_access_dag
from fastapi import Depends, FastAPI, HTTPException, Path, Query, Response

from airflow_ai_provider.errors import AiProviderError

_PAGE = "docs/index.html"
_SANDBOX = {"Content-Security-Policy": "sandbox allow-scripts allow-popups", "X-Content-Type-Options": "nosniff"}
Name = Annotated[str, Path(pattern=r"^[\w~-][\w.~-]*$", max_length=300)]

app = FastAPI(title="AI provider", docs_url=None, redoc_url=None, openapi_url=None)


@app.get(
    "/data-docs/{dag_id}/{kind}/{batch_id}",
    dependencies=[Depends(requires_access_dag(method="GET", access_entity=DagAccessEntity.XCOM))],
)
def show_data_docs(
    dag_id: Name, kind: Name, batch_id: Name, store: Annotated[str, Query()] = "ai_store_default"
) -> Response:
    """Return the page of one batch.

    :param store: connection of the store, as the task has it.
    """
    from airflow_ai_provider.hooks.store import StoreHook

    try:
        page = StoreHook(store).get_store().read_bytes(f"{dag_id}/{kind}/{batch_id}/{_PAGE}")
    except AiProviderError as error:
        raise HTTPException(503, f"The store of connection {store!r} could not be read: {error}") from error
    if page is None:
        raise HTTPException(404, f"Batch {batch_id} has no Data Docs in the store of connection {store!r}.")
    return Response(page, media_type="text/html; charset=utf-8", headers=_SANDBOX)
