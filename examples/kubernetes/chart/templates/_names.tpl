{{- define "hexgen.labels" -}}
app.kubernetes.io/name: hexgen-vllm
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "hexgen.engines" -}}
{{ printf "%s-engines" .Release.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "hexgen.router" -}}
{{ printf "%s-router" .Release.Name | trunc 63 | trimSuffix "-" }}
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
{{- range $taken := list "port" "shutdown-timeout" "shutdown_timeout" }}
{{- if hasKey $.Values.router.options $taken }}
{{- fail (printf "router.options must not have %s: the chart sets it from router.port and router.shutdownSeconds." $taken) }}
{{- end }}
{{- end }}
{{- mergeOverwrite $options .Values.router.options | toYaml }}
{{- end }}
