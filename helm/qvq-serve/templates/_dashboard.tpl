{{/* files/panels.yaml as Grafana's JSON: two panels a row, one legend a query. */}}
{{- define "qvq.dashboard" -}}
{{- $job := printf "%s/%s" .Release.Namespace .Release.Name }}
{{- $source := dict "type" "prometheus" "uid" "${source}" }}
{{- $panels := list }}
{{- range $i, $panel := (.Files.Get "files/panels.yaml" | replace "JOB" $job | fromYaml).panels }}
  {{- $targets := list }}
  {{- range $n, $query := $panel.queries }}
    {{- $targets = append $targets (dict "refId" (printf "Q%d" $n) "expr" $query.expr "legendFormat" $query.legend "datasource" $source) }}
  {{- end }}
  {{- $at := dict "x" (mul 12 (mod $i 2)) "y" (mul 8 (div $i 2)) "w" 12 "h" 8 }}
  {{- $panels = append $panels (dict "id" (add1 $i) "type" "timeseries" "title" $panel.title "description" $panel.description "gridPos" $at "datasource" $source "fieldConfig" (dict "defaults" (dict "unit" $panel.unit) "overrides" list) "targets" $targets) }}
{{- end }}
{{- $variable := dict "name" "source" "type" "datasource" "query" "prometheus" "label" "Prometheus" }}
{{- dict "title" (printf "qvq-serve: %s" .Release.Name) "uid" (printf "%s-%s" .Release.Namespace .Release.Name | trunc 40) "schemaVersion" 39 "time" (dict "from" "now-3h" "to" "now") "refresh" "30s" "tags" (list "qvq-serve") "templating" (dict "list" (list $variable)) "panels" $panels | toPrettyJson }}
{{- end }}
