{{- define "hexgen.labels" -}}
app.kubernetes.io/name: hexgen-vllm
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "hexgen.engines" -}}
{{ printf "%s-engines" .Release.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "hexgen.router" -}}
{{ printf "%s-router" .Release.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "hexgen.store" -}}
{{ printf "%s-store" .Release.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- /* Of a type of engine: the release's name is cut where both together are too long. */}}
{{- define "hexgen.type" -}}
{{- $release := .release | trunc (int (sub 51 (len .type))) | trimSuffix "-" }}
{{- printf "%s-%s" $release .type }}
{{- end }}

{{- define "hexgen.routerOptions" -}}
{{- $options := dict "host" "0.0.0.0" "port" (int .Values.router.port) "shutdown-timeout" (int .Values.router.shutdownSeconds) "log-format" "json" }}
{{- if eq .Values.router.discovery "dns" }}
{{- $_ := set $options "worker-dns" (list (printf "%s:%d" (include "hexgen.engines" .) (int .Values.enginePort))) }}
{{- else }}
{{- $_ := set $options "service-discovery" true }}
{{- $_ := set $options "selector" (list (printf "app.kubernetes.io/instance=%s" .Release.Name) "app.kubernetes.io/component=engine") }}
{{- $_ := set $options "service-discovery-port" (int .Values.enginePort) }}
{{- $_ := set $options "service-discovery-namespace" .Release.Namespace }}
{{- end }}
{{- if .Values.router.store.deploy }}
{{- $_ := set $options "replicas" (printf "redis://%s:6379/0" (include "hexgen.store" .)) }}
{{- end }}
{{- $own := default dict .Values.router.options }}
{{- range $taken := list "port" "shutdown-timeout" }}
{{- if hasKey $own $taken }}
{{- fail (printf "router.options must not have %s: the chart sets it from router.port and router.shutdownSeconds." $taken) }}
{{- end }}
{{- end }}
{{- range $taken := list "ssl-certfile" "ssl-keyfile" "ssl-ca-certs" }}
{{- if hasKey $own $taken }}
{{- fail (printf "router.options must not have %s: probes and Service speak HTTP; let an Ingress or a mesh end TLS." $taken) }}
{{- end }}
{{- end }}
{{- mergeOverwrite $options $own | toYaml }}
{{- end }}
