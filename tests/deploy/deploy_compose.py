"""Pydantic models of the Prometheus and Grafana files in deploy/compose; only the keys that the files use are valid."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


# prometheus.io/docs/prometheus/latest/configuration/configuration


class Global(Strict):
    scrape_interval: str = Field(pattern=r"^\d+[smh]$")


class Authorization(Strict):
    credentials_file: str


class StaticConfig(Strict):
    targets: list[str]


class ScrapeConfig(Strict):
    job_name: str
    authorization: Authorization
    static_configs: list[StaticConfig]


class Prometheus(Strict):
    global_: Global = Field(alias="global")
    scrape_configs: list[ScrapeConfig]


# grafana.com/docs/grafana/latest/administration/provisioning


class JsonData(Strict):
    timeInterval: str


class DataSource(Strict):
    name: str
    type: Literal["prometheus"]
    access: Literal["proxy"]
    url: str
    isDefault: bool
    jsonData: JsonData


class DataSources(Strict):
    apiVersion: Literal[1]
    datasources: list[DataSource]


class DashboardOptions(Strict):
    path: str


class DashboardProvider(Strict):
    name: str
    type: Literal["file"]
    options: DashboardOptions


class Dashboards(Strict):
    apiVersion: Literal[1]
    providers: list[DashboardProvider]


MODELS = {
    "compose/prometheus.yaml": Prometheus,
    "compose/grafana/datasources.yaml": DataSources,
    "compose/grafana/dashboards.yaml": Dashboards,
}
