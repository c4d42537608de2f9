#!/usr/bin/env bash
# Prints the folder that holds Apache Kafka's jars, fetching them through Maven the first time (54 MB).
#
# The folder lies outside the checkout, keyed by version, and appears by one rename: a broken download leaves nothing
# behind that a later run would take for complete.
set -euo pipefail

version=4.1.1
cache=${XDG_CACHE_HOME:-$HOME/.cache}/airflow-ai-provider/kafka-$version
if [ ! -d "$cache" ]; then
    command -v mvn >/dev/null || { echo "Kafka's jars come through Maven: run  apt-get install -y maven  first." >&2; exit 1; }
    mkdir -p "$(dirname "$cache")"
    fresh=$(mktemp -d "$cache.XXXXXX")
    trap 'rm -rf "$fresh"' EXIT
    mkdir "$fresh/jars"
    cat >"$fresh/pom.xml" <<POM
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>airflow-ai-provider</groupId>
  <artifactId>kafka-jars</artifactId>
  <version>1</version>
  <packaging>pom</packaging>
  <dependencies>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>$version</version></dependency>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka-tools</artifactId><version>$version</version></dependency>
    <dependency><groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId><version>1.7.36</version></dependency>
  </dependencies>
</project>
POM
    echo "Fetching Apache Kafka $version through Maven ..." >&2
    mvn -q -B -f "$fresh/pom.xml" dependency:copy-dependencies -DoutputDirectory="$fresh/jars" >&2
    mv -T "$fresh/jars" "$cache" 2>/dev/null || [ -d "$cache" ] # another run may have been first
fi
echo "$cache"
