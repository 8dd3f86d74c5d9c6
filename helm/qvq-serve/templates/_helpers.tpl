{{- define "qvq.labels" -}}
app.kubernetes.io/name: qvq-serve
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "qvq.server" -}}
app.kubernetes.io/name: qvq-serve
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end }}

{{- define "qvq.router" -}}
app.kubernetes.io/name: qvq-serve
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: router
{{- end }}

{{- define "qvq.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ with .Values.image.digest }}@{{ . }}{{ end }}
{{- end }}

{{/* The profile's file: the user's own, or one of launch/profiles. */}}
{{- define "qvq.profile" -}}
{{- if .Values.customProfile }}{{ .Values.customProfile }}
{{- else }}{{ .Files.Get (printf "profiles/%s.toml" .Values.profile) }}
{{- end }}
{{- end }}

{{/* The Deployment's or the LeaderWorkerSet's name: LeaderWorkerSet wants a headless Service of its own name. */}}
{{- define "qvq.workload" -}}
{{ .Release.Name }}{{ if gt (int .Values.nodes) 1 }}-nodes{{ end }}
{{- end }}

{{/* Environment variables, `own` (YAML) but for those that `extra` gives another value: two of a name are refused. */}}
{{- define "qvq.env" -}}
{{- $names := list }}
{{- range .extra }}{{ $names = append $names .name }}{{ end }}
{{- range fromYamlArray .own }}
{{- if not (has .name $names) }}
- {{ toJson . }}
{{- end }}
{{- end }}
{{- with .extra }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* For the name of a Job, of everything that its pod is made of. */}}
{{- define "qvq.hash" -}}
{{- toJson . | sha256sum | trunc 8 }}
{{- end }}

{{/* What the profile and `settings` make together, of what the chart itself needs. */}}
{{- define "qvq.launch" -}}
{{- $profile := include "qvq.profile" . | fromToml }}
{{- $launch := mergeOverwrite (dict "model" "qvq-72b" "tp" 1 "pp" 1) (omit $profile "hardware" "vllm") .Values.settings }}
{{- toYaml (pick $launch "model" "tp" "pp" "max_body_bytes") }}
{{- end }}

{{/* Whom a NetworkPolicy lets in whatever its clients are: the helm test, and the bench Job. */}}
{{- define "qvq.ownClients" -}}
- podSelector:
    matchLabels: {app.kubernetes.io/instance: {{ .Release.Name }}}
    matchExpressions: [{key: app.kubernetes.io/component, operator: In, values: [test, bench]}]
{{- end }}

{{/* What Kubernetes must know: plan.yaml's for the profile, with `plan` over it. */}}
{{- define "qvq.plan" -}}
{{- $known := .Files.Get "plan.yaml" | fromYaml }}
{{- $plan := ternary dict (get $known .Values.profile | default dict) (ne .Values.customProfile "") }}
{{- toYaml (mergeOverwrite (deepCopy $plan) .Values.plan) }}
{{- end }}

{{/* Where the model lies in a pod: a volume of weights, or none for the demo, which is in the package. */}}
{{- define "qvq.hasWeights" -}}
{{- if ne (include "qvq.launch" . | fromYaml).model "demo" }}true{{ end }}
{{- end }}

{{- define "qvq.downloads" -}}
{{- $known := list "qvq-72b" "qvq-72b-awq" }}
{{- if and .Values.weights.download (ne .Values.weights.kind "hostPath") (has (include "qvq.launch" . | fromYaml).model $known) }}true{{ end }}
{{- end }}

{{- define "qvq.weightsVolume" -}}
name: models
{{- if eq .Values.weights.kind "hostPath" }}
hostPath: {path: {{ .Values.weights.hostPath | quote }}, type: Directory}
{{- else if eq .Values.weights.kind "existingClaim" }}
persistentVolumeClaim: {claimName: {{ .Values.weights.existingClaim | quote }}}
{{- else }}
persistentVolumeClaim: {claimName: {{ .Release.Name }}-weights}
{{- end }}
{{- end }}

{{- define "qvq.podSecurity" -}}
automountServiceAccountToken: false
# Else a Service that is named qvq gives QVQ_PORT=tcp://..., which is a setting of ours.
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 1000
  runAsGroup: 1000
  fsGroup: 1000
  fsGroupChangePolicy: OnRootMismatch
  {{- if and .listens (lt (int (min .Values.service.port .Values.service.metricsPort)) 1024) }}
  sysctls: [{name: net.ipv4.ip_unprivileged_port_start, value: "0"}]  # else root's alone, by some runtimes
  {{- end }}
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "qvq.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* QVQ_API_KEY=... before the command of a pod that asks the server, where there are keys. */}}
{{- define "qvq.clientKey" -}}
{{- if .Values.apiKeys.existingSecret }}QVQ_API_KEY=$(grep -m1 '^[^#]' /etc/qvq-keys/keys) {{ end }}
{{- end }}
